"""Parsers of Jobs, pods and termination messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.operator.builders import REPORT, TIME
from tunewright_operator.observed import Owner, parse_job, parse_owner, parse_pod, parse_report

OWNER = {"controller": True, "kind": "FineTuneJob", "name": "bot", "uid": "uid-1", "apiVersion": "tunewright.dev/v1"}


def raw_job(**changes: Any) -> dict[str, Any]:
    """Return a Job as the API server gives it."""
    metadata = {"name": "bot-train-1", "uid": "j", "creationTimestamp": TIME, "ownerReferences": [OWNER]}
    return {"metadata": {**metadata, **changes.pop("metadata", {})}, **changes}


def raw_pod(status: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """Return a pod as the API server gives it."""
    labels = {"tunewright.dev/attempt": "2"}
    given = {"name": "p", "uid": "u", "creationTimestamp": TIME, "labels": labels, **metadata}
    return {"metadata": given, "spec": {"nodeName": "node1"}, "status": status}


def with_state(**state: Any) -> dict[str, Any]:
    """Return the status of a pod whose trainer is in a state, beside a sidecar."""
    return {
        "containerStatuses": [{"name": "sidecar", "state": {"running": {}}}, {"name": "trainer", "state": state}],
    }


def test_job_in_progress() -> None:
    """A Job without a final condition is not finished; Suspended and FailureTarget are not final."""
    conditions = [{"type": "FailureTarget", "status": "True"}, {"type": "Failed", "status": "False"}]
    job = parse_job(raw_job(status={"conditions": conditions}))
    assert (job.finished, job.deleting, job.owner_uid, job.completions) == (None, False, "uid-1", 1)


@pytest.mark.parametrize("kind", ["Complete", "Failed"])
def test_finished_job(kind: str) -> None:
    """The final condition counts, with its message."""
    condition = {"type": kind, "status": "True", "message": "m", "lastTransitionTime": TIME}
    job = parse_job(raw_job(status={"conditions": [condition]}))
    assert (job.finished, job.message) == (kind, "m")


def test_jobs_of_others() -> None:
    """Owners that are not controllers do not count, and other kinds are no FineTuneJobs."""
    assert parse_owner(raw_job()) == Owner("uid-1", "FineTuneJob", "bot", deleting=False)
    assert parse_owner(raw_job(metadata={"ownerReferences": [{**OWNER, "controller": False}]})).uid is None
    other = parse_owner(
        raw_job(metadata={"ownerReferences": [{**OWNER, "kind": "CronJob"}], "deletionTimestamp": TIME})
    )
    assert other == Owner("uid-1", "CronJob", "bot", deleting=True)


def test_new_pod() -> None:
    """A pod of which nothing is known yet is pending."""
    pod = parse_pod(raw_pod({}))
    assert (pod.phase, pod.attempt, pod.running, pod.terminal) == ("Pending", 2, False, False)


@pytest.mark.parametrize("label", [None, "x", "-1", "1e9"])
def test_a_forged_attempt_is_none_of_ours(label: str | None) -> None:
    """Whoever may edit pods may edit the label; it never raises."""
    labels = {} if label is None else {"tunewright.dev/attempt": label}
    assert parse_pod(raw_pod({}, labels=labels)).attempt == 0


def test_a_pod_of_several_has_its_number() -> None:
    """The Job controller writes it into an annotation; nonsense in it never raises."""
    for text, index in (("7", 7), ("x", 0), ("-1", 0), ("9" * 5000, 0)):
        pod = parse_pod(raw_pod({}, annotations={"batch.kubernetes.io/job-completion-index": text}))
        assert pod.index == index
        assert not pod.fresh, "it has a node"
    assert parse_job(raw_job(spec={"completions": 8})).completions == 8


def test_when_a_pod_does_its_part() -> None:
    """Its container runs, or has ended well; not when it waits, failed, or is gone."""
    ended = {"exitCode": 0, "reason": "Completed", "startedAt": TIME, "finishedAt": TIME}
    running = raw_pod({"phase": "Running", **with_state(running={"startedAt": TIME})})
    assert parse_pod(running).ready
    assert not parse_pod(running, gone=True).ready
    assert parse_pod(raw_pod({"phase": "Succeeded", **with_state(terminated=ended)})).ready
    assert not parse_pod(raw_pod({"phase": "Failed", **with_state(terminated={**ended, "exitCode": 1})})).ready
    assert not parse_pod(raw_pod({})).ready


def test_unschedulable() -> None:
    """The scheduler's message is kept; a pod held back by a gate is not unschedulable."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}
    assert parse_pod(raw_pod({"conditions": [condition]})).unschedulable == "0/3"
    assert parse_pod(raw_pod({"conditions": [{**condition, "reason": "SchedulingGated"}]})).unschedulable is None


@pytest.mark.parametrize(
    ("reason", "image", "config"),
    [
        ("ErrImagePull", True, False),
        ("ImagePullBackOff", True, False),
        ("InvalidImageName", False, True),
        ("CreateContainerConfigError", False, True),
        ("ContainerCreating", False, False),
    ],
)
def test_waiting(reason: str, image: bool, config: bool) -> None:
    """Reasons of a waiting container fall into two kinds of problem, or none."""
    pod = parse_pod(raw_pod(with_state(waiting={"reason": reason, "message": "m"})))
    assert (pod.image_problem, pod.config_problem, pod.waiting_message) == (image, config, "m")


def test_running_and_terminated() -> None:
    """Times, exit code and report come from the trainer's container, not from a sidecar."""
    assert parse_pod(raw_pod(with_state(running={"startedAt": TIME}))).started_at == TIME
    state = {"exitCode": 137, "reason": "OOMKilled", "message": "r", "startedAt": TIME, "finishedAt": "later"}
    pod = parse_pod(raw_pod({"phase": "Failed", **with_state(terminated=state)}))
    assert (pod.exit_code, pod.termination_reason, pod.report, pod.ended_at) == (137, "OOMKilled", "r", "later")
    assert pod.terminal


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("PreemptionByScheduler", "Preempted"),
        ("EvictionByEvictionAPI", "Evicted"),
        ("TerminationByKubelet", "Evicted"),
        ("DeletionByTaintManager", "NodeLost"),
        ("DeletionByPodGC", "NodeLost"),
        ("SomethingNew", "Evicted"),
    ],
)
def test_disruption(reason: str, meaning: str) -> None:
    """The DisruptionTarget condition says who took the pod."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "m"}
    assert parse_pod(raw_pod({"conditions": [condition]})).disruption == meaning
    assert parse_pod(raw_pod({"conditions": [{**condition, "status": "False"}]})).disruption is None


def test_a_deleted_pod_runs_no_more() -> None:
    """The last state of a pod that is gone counts as an end, whatever it says."""
    assert parse_pod(raw_pod(with_state(running={})), gone=True).terminal


def test_report() -> None:
    """A valid report parses."""
    report = parse_report(json.dumps(REPORT))
    assert report is not None
    assert report.run_key == "0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "Killed",
        "[]",
        json.dumps({**REPORT, "extra": 1}),
        json.dumps({**REPORT, "runKey": "../../x"}),
        json.dumps({**REPORT, "message": "x" * 5000}),
        '{"exitCode": 0, "reason": "x", "loss": NaN}',
    ],
)
def test_what_is_no_report(text: str | None) -> None:
    """Anything else is no report; it never raises."""
    assert parse_report(text) is None
