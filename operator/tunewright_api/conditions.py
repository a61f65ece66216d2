"""Condition types, reasons and the pure function that sets a condition."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from tunewright_api.base import StatusModel


class ConditionType(enum.StrEnum):
    """Conditions of a workload; all are present from the first visit on."""

    ACCEPTED = "Accepted"
    """The spec is usable."""
    SUSPENDED = "Suspended"
    """There are no pods, by request."""
    PODS_READY = "PodsReady"
    """All pods of the current attempt run."""
    COMPLETE = "Complete"
    """Succeeded; terminal."""
    FAILED = "Failed"
    """Gave up; terminal."""
    READY = "Ready"
    """The result is published and usable (kstatus)."""
    STALLED = "Stalled"
    """Will not go on without a person (kstatus)."""


class Reason(enum.StrEnum):
    """Reasons in conditions and events that the operator itself gives; the trainer's come from `exit_codes`."""

    PENDING = "Pending"
    """Not known yet."""
    VALIDATED = "Validated"
    """The spec is usable."""
    INVALID_SPEC = "InvalidSpec"
    """The spec got past the API server (an older CRD) but breaks a rule; the message lists every problem."""
    NOT_SUSPENDED = "NotSuspended"
    """`spec.suspend` is false."""
    USER_SUSPENDED = "UserSuspended"
    """`spec.suspend` is true."""
    RESUMED = "Resumed"
    """`spec.suspend` went back to false."""
    WAITING_FOR_FINETUNEJOB = "WaitingForFineTuneJob"
    """A FineTuneJob whose result this one needs is not complete, or not there yet; no Job is created until it is."""
    WAITING_FOR_ADAPTERMERGE = "WaitingForAdapterMerge"
    """The same of an AdapterMerge."""
    DEPENDENCY_FAILED = "DependencyFailed"
    """A FineTuneJob or AdapterMerge whose result this one needs has failed, or waits for this one itself."""
    WAITING_FOR_PODS = "WaitingForPods"
    """The Job is there, not all of its pods run yet."""
    ALL_READY = "AllReady"
    """All pods run."""
    UNSCHEDULABLE = "Unschedulable"
    """No node fits a pod; the message is the scheduler's."""
    IMAGE_PULL_FAILED = "ImagePullFailed"
    """The trainer image cannot be pulled."""
    CONFIG_ERROR = "ConfigError"
    """The container cannot be created, most often because a Secret is missing."""
    RESTARTING = "Restarting"
    """An attempt ended; the next one starts at `status.nextAttemptTime`."""
    IN_PROGRESS = "InProgress"
    """Not finished yet."""
    SUCCEEDED = "Succeeded"
    """Trained or merged, and published."""
    EARLY_STOPPED = "EarlyStopped"
    """Trained and published; training ended before its last step because evaluations got no better
    (`evaluation.earlyStopping`)."""
    CACHED = "Cached"
    """A result with the same run key was there already; nothing was trained or merged."""
    ARTIFACT_PUBLISHED = "ArtifactPublished"
    """The result is at `status.output`."""
    JOB_CREATED = "JobCreated"
    """The Job of an attempt was created."""
    STARTED = "Started"
    """The pod of an attempt started."""
    OUT_OF_MEMORY = "OutOfMemory"
    """The container was killed for going over its memory limit."""
    EVICTED = "Evicted"
    """The kubelet took the pod off its node (disk, memory); does not count as a restart."""
    PREEMPTED = "Preempted"
    """A pod of higher priority, or a drain, took the place; does not count as a restart."""
    NODE_LOST = "NodeLost"
    """The node stopped answering; does not count as a restart."""
    POD_DELETED = "PodDeleted"
    """Somebody deleted the pod."""
    JOB_DELETED = "JobDeleted"
    """Somebody deleted the Job."""
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    """More attempts failed than `retry.maxRestarts` allows; the message names the last cause."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """`retry.timeouts.queue` or `retry.timeouts.run` is over."""
    NAME_CONFLICT = "NameConflict"
    """A Job or Service of the name exists and belongs to somebody else."""
    FORBIDDEN = "Forbidden"
    """The API server refused the Job or its Service: quota, admission policy, Pod Security."""
    OUTPUT_MISSING = "OutputMissing"
    """The pod ended well but left no report of a published result."""


class Condition(StatusModel):
    """One entry of `status.conditions`, as the Kubernetes API conventions define it."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=128)]
    message: Annotated[str, Field(max_length=4096)] = ""
    last_transition_time: str
    observed_generation: int | None = None


def set_condition(conditions: Sequence[Condition], new: Condition) -> list[Condition]:
    """Return `conditions` with `new` in place of the one of its type.

    `lastTransitionTime` moves only when `status` does, so a changed message does not look like a transition.
    """
    result = list(conditions)
    for index, old in enumerate(result):
        if old.type == new.type:
            if old.status == new.status:
                new = new.model_copy(update={"last_transition_time": old.last_transition_time})
            result[index] = new
            return result
    return [*result, new]


def find_condition(conditions: Sequence[Condition], kind: ConditionType) -> Condition | None:
    """Return the condition of a type, or None before the first visit."""
    return next((c for c in conditions if c.type == kind), None)


def is_true(conditions: Sequence[Condition], kind: ConditionType) -> bool:
    """Tell whether a condition is there and true."""
    condition = find_condition(conditions, kind)
    return condition is not None and condition.status == "True"
