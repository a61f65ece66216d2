"""What the cluster shows of a run: frozen values parsed from Jobs and pods. Pure.

Only what decisions need is kept, so that thousands of runs fit into little memory.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from tunewright_api.run_report import MAX_REPORT_BYTES, Progress, RunReport
from tunewright_operator.constants import ANNOTATION_INDEX, CONTAINER_NAME, LABEL_ATTEMPT
from tunewright_operator.kinds import Kind

Raw = Mapping[str, Any]

_DISRUPTIONS = {
    "PreemptionByScheduler": "Preempted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
}

_IMAGE_PROBLEMS = frozenset({"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable"})
_CONFIG_PROBLEMS = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "InvalidImageName", "RunContainerError"}
)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose an object is."""

    uid: str | None
    """UID of the controller, whatever its kind."""
    kind: str | None
    """Kind of the controller."""
    name: str | None
    """Its name."""
    deleting: bool
    """Whether the object is being removed."""


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """One Job of a workload."""

    name: str
    uid: str
    owner_uid: str | None
    """UID of the controller, whatever its kind."""
    created: str
    completions: int = 1
    """Pods that the Job runs at once."""
    deleting: bool = False
    finished: Literal["Complete", "Failed"] | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """One pod of a Job."""

    name: str
    uid: str
    job_uid: str | None
    attempt: int
    phase: str
    created: str
    index: int = 0
    """Which pod of its Job it is: the node rank."""
    node: str | None = None
    ip: str | None = None
    scheduled_at: str | None = None
    running: bool = False
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: int | None = None
    termination_reason: str | None = None
    report: str | None = None
    """Termination message: untrusted text."""
    waiting_reason: str | None = None
    waiting_message: str = ""
    unschedulable: str | None = None
    """The scheduler's message."""
    disruption: str | None = None
    """Our reason for the DisruptionTarget condition."""
    disruption_message: str = ""
    status_reason: str | None = None
    status_message: str = ""
    deletion_time: str | None = None
    """When the pod should be gone."""
    deletion_grace: int = 0
    """Seconds that it was given for that."""
    gone: bool = False
    """The object was deleted; this was its last state."""

    @property
    def terminal(self) -> bool:
        """Whether no container of it runs or will run."""
        return self.gone or self.phase in ("Succeeded", "Failed")

    @property
    def ended(self) -> bool:
        """Whether its container has ended, or the pod as a whole."""
        return self.terminal or self.exit_code is not None

    @property
    def ready(self) -> bool:
        """Whether it does its part: its container runs, or has ended well."""
        return self.exit_code == 0 or (self.running and not self.terminal)

    @property
    def fresh(self) -> bool:
        """Whether nothing has happened to it since it was created."""
        return self == ObservedPod(self.name, self.uid, self.job_uid, self.attempt, "Pending", self.created, self.index)

    @property
    def image_problem(self) -> bool:
        """Whether the image cannot be pulled."""
        return self.waiting_reason in _IMAGE_PROBLEMS

    @property
    def config_problem(self) -> bool:
        """Whether the container cannot be created, most often because of a missing Secret."""
        return self.waiting_reason in _CONFIG_PROBLEMS


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the API server refused to create the Job."""

    kind: Literal["Forbidden", "Invalid", "Predecessor", "Foreign"]
    message: str


@dataclass(frozen=True, slots=True)
class ObservedReference:
    """Another workload whose result is needed."""

    kind: Kind
    name: str
    state: Literal["Missing", "Unfinished", "Complete", "Failed", "Circular", "NoModel"]
    """Circular: it waits, itself or by way of others, for the one that refers to it. NoModel: it is complete, and its
    result is an adapter where a model is needed."""
    detail: str = ""
    """Phase of an unfinished one, why one failed, the way round a circle."""
    manifest_uri: str | None = None
    """Set when it is complete."""
    uri: str | None = None
    """Likewise: the folder of its result."""


@dataclass(frozen=True, slots=True)
class ObservedRun:
    """Everything that one decision is made from, besides spec and status."""

    job: ObservedJob | None = None
    """Job of the current attempt, ours by UID."""
    job_gone: bool = False
    """A live read said that the Job of the current attempt is not there."""
    pod: ObservedPod | None = None
    """Newest pod of the current attempt; of several, that of node 0, which speaks for all."""
    followers: tuple[ObservedPod, ...] = ()
    """Newest pods of the further nodes, in their order."""
    earlier_pods: tuple[str, ...] = ()
    """Pods of earlier attempts that may still run, from a live list."""
    jobs: tuple[str, ...] = ()
    """All Jobs of the workload."""
    progress: Progress | None = None
    """Set when a progress write is due."""
    refusal: Refusal | None = None
    references: tuple[ObservedReference, ...] = ()
    """Workloads whose results are needed and not in the status yet."""

    @property
    def pods(self) -> tuple[ObservedPod, ...]:
        """Newest pods of the current attempt, in the order of the nodes."""
        return self.followers if self.pod is None else (self.pod, *self.followers)


def parse_time(text: str) -> datetime.datetime:
    """Return an RFC 3339 time as Kubernetes writes it."""
    return datetime.datetime.fromisoformat(text)


def parse_owner(raw: Raw) -> Owner:
    """Parse whose an object of any kind is."""
    metadata = raw["metadata"]
    owner: Raw = next((o for o in metadata.get("ownerReferences", ()) if o.get("controller")), {})
    return Owner(owner.get("uid"), owner.get("kind"), owner.get("name"), "deletionTimestamp" in metadata)


def parse_job(raw: Raw) -> ObservedJob:
    """Parse a batch/v1 Job."""
    metadata, owner = raw["metadata"], parse_owner(raw)
    finished = next(
        (
            c
            for c in raw.get("status", {}).get("conditions", ())
            if c["type"] in ("Complete", "Failed") and c["status"] == "True"
        ),
        None,
    )
    return ObservedJob(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=owner.uid,
        created=metadata["creationTimestamp"],
        # A stranger's Job of our name may have none.
        completions=raw.get("spec", {}).get("completions", 1),
        deleting=owner.deleting,
        finished=finished["type"] if finished else None,
        message=finished.get("message", "") if finished else "",
    )


def parse_pod(raw: Raw, *, gone: bool = False) -> ObservedPod:
    """Parse a pod. `gone`: it was deleted and this is its last state."""
    metadata, status = raw["metadata"], raw.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    scheduled = conditions.get("PodScheduled", {})
    disruption = conditions.get("DisruptionTarget", {})
    disrupted = disruption.get("status") == "True"
    container: Raw = next((c for c in status.get("containerStatuses", ()) if c["name"] == CONTAINER_NAME), {})
    state = container.get("state", {})
    waiting, running, ended = state.get("waiting", {}), state.get("running"), state.get("terminated", {})
    return ObservedPod(
        name=metadata["name"],
        uid=metadata["uid"],
        job_uid=parse_owner(raw).uid,
        attempt=_number(metadata.get("labels", {}).get(LABEL_ATTEMPT, "")),
        phase=status.get("phase", "Pending"),
        created=metadata["creationTimestamp"],
        index=_number(metadata.get("annotations", {}).get(ANNOTATION_INDEX, "")),
        node=raw.get("spec", {}).get("nodeName"),
        ip=status.get("podIP"),
        scheduled_at=scheduled.get("lastTransitionTime") if scheduled.get("status") == "True" else None,
        running=running is not None,
        started_at=ended.get("startedAt") or (running or {}).get("startedAt"),
        ended_at=ended.get("finishedAt"),
        exit_code=ended.get("exitCode"),
        termination_reason=ended.get("reason"),
        report=ended.get("message"),
        waiting_reason=waiting.get("reason"),
        waiting_message=waiting.get("message", ""),
        unschedulable=_unschedulable(scheduled),
        disruption=_DISRUPTIONS.get(disruption.get("reason", ""), "Evicted") if disrupted else None,
        disruption_message=disruption.get("message", "") if disrupted else "",
        status_reason=status.get("reason"),
        status_message=status.get("message", ""),
        deletion_time=metadata.get("deletionTimestamp"),
        deletion_grace=metadata.get("deletionGracePeriodSeconds") or 0,
        gone=gone,
    )


def _number(text: str) -> int:
    """Return the number in a label or annotation: whoever may edit pods may edit it, and then it is 0."""
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _unschedulable(condition: Raw) -> str | None:
    if condition.get("status") == "False" and condition.get("reason") == "Unschedulable":
        return str(condition.get("message", "")) or "no node fits"
    return None


def parse_report(text: str | None) -> RunReport | None:
    """Parse a termination message; None when it is no report. The image may be anybody's: nothing is trusted."""
    if not text or len(text.encode()) > MAX_REPORT_BYTES:
        return None
    try:
        return RunReport.model_validate_json(text)
    except ValidationError:
        return None
