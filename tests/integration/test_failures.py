"""Each cause of a failure is named, and retried or not as it should be; the test plays kubelet and scheduler."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.integration.conftest import Api, Operator, container, finetunejob, wait

TIME = "2026-01-01T00:00:00Z"


class Problem(NamedTuple):
    """What a pod shows before it runs, and what is to be said of it."""

    status: dict[str, Any]
    reason: str
    part: str


def waiting(reason: str, message: str) -> dict[str, Any]:
    """Return the status of a pod whose container waits."""
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": TIME}
    return {
        "phase": "Pending",
        "conditions": [scheduled],
        "containerStatuses": [container(waiting={"reason": reason, "message": message})],
    }


UNSCHEDULABLE = Problem(
    {
        "phase": "Pending",
        "conditions": [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
                "lastTransitionTime": TIME,
            }
        ],
    },
    "Unschedulable",
    "Insufficient nvidia.com/gpu",
)
FATAL = {
    "image-pull": Problem(waiting("ImagePullBackOff", 'Back-off pulling "nowhere/x"'), "ImagePullFailed", "nowhere/x"),
    "pull-error": Problem(waiting("ErrImagePull", "no such host"), "ImagePullFailed", "no such host"),
    "image-name": Problem(waiting("InvalidImageName", "couldn't parse"), "ImagePullFailed", "couldn't parse"),
    "secret": Problem(
        waiting("CreateContainerConfigError", 'secret "s3-credentials" not found'), "ConfigError", "s3-credentials"
    ),
}


def test_unschedulable_waits(api: Api, operator: Operator) -> None:
    """A pod that fits no node is waited for, with the scheduler's own words in the condition."""
    api.create(finetunejob("bot"))
    api.play_kubelet(api.pod("bot"), **UNSCHEDULABLE.status)
    wait(lambda: api.condition("bot", "PodsReady").get("reason") == "Unschedulable", "the condition")
    assert UNSCHEDULABLE.part in api.condition("bot", "PodsReady")["message"]
    assert api.status("bot")["phase"] == "Pending"
    assert api.reasons("bot")[-1] == "Unschedulable"


@pytest.mark.parametrize("problem", FATAL.values(), ids=FATAL.keys())
def test_pod_that_cannot_start(api: Api, operator: Operator, problem: Problem) -> None:
    """A pod that cannot start fails the run after the grace period, without a retry, and its Job goes."""
    api.create(finetunejob("bot"))
    api.play_kubelet(api.pod("bot"), **problem.status)
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"]["reason"] == problem.reason
    assert problem.part in status["failure"]["message"]
    assert len(status["attempts"]) == 1
    wait(lambda: not api.items("jobs"), "removal of the Job")


def test_problem_that_passes(api: Api, operator: Operator) -> None:
    """A missing Secret that appears in time is no failure."""
    api.create(finetunejob("bot"))
    problem = FATAL["secret"].status
    fresh = {**problem, "conditions": []}
    api.play_kubelet(api.pod("bot"), **fresh)
    wait(lambda: api.condition("bot", "PodsReady").get("reason") == "ConfigError", "the condition")
    api.play_kubelet(api.pod("bot"), phase="Running", containerStatuses=[container(running={"startedAt": TIME})])
    api.until("bot", lambda s: s.get("phase") == "Running")


class End(NamedTuple):
    """How a pod ends, and what is to come of it."""

    exit_code: int
    cause: str
    counted: bool
    part: str = ""
    ended_as: str = "Error"
    status: Mapping[str, Any] = MappingProxyType({})


def disrupted(reason: str) -> dict[str, Any]:
    """Return conditions of a pod that the platform took."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": f"by {reason}"}
    return {"conditions": [condition | {"lastTransitionTime": TIME}]}


RETRIED = {
    "oom": End(137, "OutOfMemory", True, "memory limit of 3Gi", ended_as="OOMKilled"),
    "internal": End(1, "InternalError", True, "exit code 1"),
    "unavailable": End(23, "StorageUnavailable", True),
    "stalled": End(26, "Stalled", True),
    "killed": End(137, "Killed", True),
    "unknown-code": End(99, "InternalError", True, "exit code 99"),
    "preempted-in-order": End(25, "Preempted", False),
    "preempted": End(143, "Preempted", False, "higher priority", status=disrupted("PreemptionByScheduler")),
    "evicted": End(143, "Evicted", False, "evicted", status=disrupted("EvictionByEvictionAPI")),
    "node-pressure": End(137, "Evicted", False, status=disrupted("TerminationByKubelet")),
    "node-lost": End(143, "NodeLost", False, "node", status=disrupted("DeletionByTaintManager")),
    "disk-limit": End(
        137, "Evicted", True, "ephemeralStorage", status={"reason": "Evicted", "message": "usage exceeds 2Gi"}
    ),
}


@pytest.mark.parametrize("end", RETRIED.values(), ids=RETRIED.keys())
def test_retried(api: Api, operator: Operator, end: End) -> None:
    """Causes that may pass lead to a new Job; only those that the run itself is to blame for count."""
    api.create(finetunejob("bot", resources={"memory": "3Gi"}))
    api.end_pod(api.pod("bot"), end.exit_code, ended_as=end.ended_as, **end.status)
    status = api.until("bot", lambda s: s.get("attempt") == 2)
    attempt = status["attempts"][0]
    assert attempt["cause"] == end.cause
    assert attempt["exitCode"] == end.exit_code
    assert end.part in attempt["message"]
    assert (status["restarts"], status["freeRestarts"]) == ((1, 0) if end.counted else (0, 1))
    assert end.cause in api.reasons("bot")
    assert {job["metadata"]["name"] for job in api.items("jobs")} == {"bot-train-1", "bot-train-2"}


@pytest.mark.parametrize(("code", "reason"), [(20, "InvalidInput"), (21, "AccessDenied"), (24, "Diverged")])
def test_fatal(api: Api, operator: Operator, code: int, reason: str) -> None:
    """What would fail again fails at once, with the trainer's message."""
    message = "s3://datasets/train.jsonl: line 4711: not JSON: mend the line"
    report = {"exitCode": code, "reason": reason, "message": message, "stage": "Checking"}
    api.create(finetunejob("bot"))
    api.end_pod(api.pod("bot"), code, json.dumps(report))
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"] == {"reason": reason, "message": message, "exitCode": code}
    assert api.condition("bot", "Stalled")["status"] == "True"
    assert len(api.items("jobs")) == 1


def test_restarts_run_out(api: Api, operator: Operator) -> None:
    """After maxRestarts the run fails, and the message carries the last cause."""
    api.create(finetunejob("bot", retry={"maxRestarts": 1}))
    for attempt in (1, 2):
        api.end_pod(api.pod("bot", attempt), 137, ended_as="OOMKilled")
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"]["reason"] == "BackoffLimitExceeded"
    assert "OutOfMemory" in status["failure"]["message"]
    assert "retry.maxRestarts" in status["failure"]["message"]
    assert [a["cause"] for a in status["attempts"]] == ["OutOfMemory", "OutOfMemory"]


def test_gpu_out_of_memory(api: Api, operator: Operator) -> None:
    """After a GPU ran out of memory the next attempt has half the micro-batch and twice the accumulation."""
    api.create(finetunejob("bot"))
    api.end_pod(api.pod("bot"), 22)
    environment = api.pod("bot", 2)["spec"]["containers"][0]["env"]
    run = json.loads(next(e["value"] for e in environment if e["name"] == "TUNEWRIGHT_RUN"))
    assert (run["hyperparameters"]["batchSize"], run["hyperparameters"]["gradientAccumulationSteps"]) == (2, 8)


def test_job_deleted_by_hand(api: Api, operator: Operator) -> None:
    """A Job that somebody deletes is named as the cause of a new attempt."""
    api.create(finetunejob("bot"))
    api.pod("bot")
    api.until("bot", lambda s: s.get("jobRef"))
    api.delete("jobs", "bot-train-1")
    status = api.until("bot", lambda s: s.get("attempts"))
    assert status["attempts"][0]["cause"] == "JobDeleted"
    for pod in api.items("pods", "tunewright.dev/attempt=1"):
        api.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)
    assert api.until("bot", lambda s: s.get("attempt") == 2)["freeRestarts"] == 1


def test_pod_deleted_by_hand(api: Api, operator: Operator) -> None:
    """A pod that somebody deletes is named as the cause of a new attempt."""
    api.create(finetunejob("bot"))
    pod = api.pod("bot")
    api.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)
    status = api.until("bot", lambda s: s.get("attempts"))
    assert status["attempts"][0]["cause"] == "PodDeleted"
    api.until("bot", lambda s: s.get("attempt") == 2)


def test_queue_timeout(api: Api, operator: Operator) -> None:
    """A pod that does not start in time fails the run and frees its place."""
    api.create(finetunejob("bot", retry={"timeouts": {"queue": "2s"}}))
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"]["reason"] == "DeadlineExceeded"
    assert "timeouts.queue of 2s" in status["failure"]["message"]
    wait(lambda: not api.items("jobs"), "removal of the Job")


def test_run_timeout(api: Api, operator: Operator) -> None:
    """A run that takes too long fails and frees its place."""
    api.create(finetunejob("bot", retry={"timeouts": {"run": "1h"}}))
    api.play_kubelet(api.pod("bot"), phase="Running", containerStatuses=[container(running={"startedAt": TIME})])
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"]["reason"] == "DeadlineExceeded"
    assert "timeouts.run of 1h" in status["failure"]["message"]
    wait(lambda: not api.items("jobs"), "removal of the Job")


def test_node_that_does_not_answer(api: Api, operator: Operator) -> None:
    """A deleted pod whose node never confirms is given up after the grace period; a new attempt starts."""
    api.create(finetunejob("bot"))
    pod = api.pod("bot")
    api.bind(pod)
    api.play_kubelet(pod, phase="Running", containerStatuses=[container(running={"startedAt": TIME})])
    api.until("bot", lambda s: s.get("phase") == "Running")
    api.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=1)
    status = api.until("bot", lambda s: s.get("attempt") == 2)
    assert status["attempts"][0]["cause"] == "NodeLost"
