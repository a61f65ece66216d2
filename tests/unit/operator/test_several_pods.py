"""An attempt of several pods: when it runs, what it waits for, whose end is its cause."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.operator.builders import NOW, REPORT, SETTINGS, TIME, created, ended_pod, finetunejob, job, later, pod
from tunewright_api.conditions import ConditionType, find_condition
from tunewright_api.run_report import Progress
from tunewright_api.v1alpha1.finetunejob import FineTuneJob
from tunewright_api.v1alpha1.status import RunStatus
from tunewright_operator.observed import ObservedPod, ObservedRun
from tunewright_operator.status import DeleteJobs, decide

PAIR = finetunejob(resources={"nodes": 2, "gpus": 2})
JOB = job(completions=2)
DELETED = DeleteJobs(("bot-train-1",), ("ftj-bot-train-1",))
PEER_LOST: dict[str, Any] = {
    "exit_code": 1,
    "report": json.dumps({"exitCode": 1, "reason": "PeerLost", "message": "lost node 1"}),
}


def at(second: int) -> str:
    """Return the time `second` seconds after 12:01."""
    return later(60 + second).strftime("%Y-%m-%dT%H:%M:%SZ")


def node(index: int, **changes: Any) -> ObservedPod:
    """Return a pod that waits."""
    return pod(name=f"bot-train-1-{index}-x", uid=f"pod-{index}", index=index, **changes)


def running(index: int, **changes: Any) -> ObservedPod:
    """Return a pod that runs."""
    return node(index, **{"phase": "Running", "running": True, "node": "a", "started_at": TIME, **changes})


def end(index: int, exit_code: int, second: int = 0, **changes: Any) -> ObservedPod:
    """Return a pod that ended `second` seconds after 12:01."""
    names = {"name": f"bot-train-1-{index}-x", "uid": f"pod-{index}", "index": index}
    return ended_pod(exit_code, **{**names, "node": f"node{index}", "ended_at": at(second), **changes})


def removed(second: int, grace: int = 60) -> dict[str, Any]:
    """Return what a pod shows that was asked to go `second` seconds after 12:01."""
    return {"deletion_time": at(second + grace), "deletion_grace": grace}


def seen(*pods: ObservedPod, **changes: Any) -> ObservedRun:
    """Return what the cluster shows of a run with two nodes."""
    first = next((one for one in pods if one.index == 0), None)
    followers = tuple(one for one in pods if one.index > 0)
    return replace(ObservedRun(job=JOB, pod=first, followers=followers), **changes)


def pods_ready(status: RunStatus) -> tuple[str, str, str]:
    """Return status, reason and message of PodsReady."""
    found = find_condition(status.conditions, ConditionType.PODS_READY)
    assert found is not None
    return found.status, found.reason, found.message


NOT_YET: dict[str, tuple[tuple[ObservedPod, ...], str, str]] = {
    "none": ((), "WaitingForPods", "0/2 pods ready"),
    "one waits": ((running(0), node(1)), "WaitingForPods", "1/2 pods ready"),
    "one is missing": ((running(0),), "WaitingForPods", "1/2 pods ready"),
    "the first one waits": ((node(0), running(1)), "WaitingForPods", "1/2 pods ready"),
    "no node for one": (
        (running(0), node(1, unschedulable="0/1 nodes")),
        "Unschedulable",
        "1/2 pods ready; pod bot-train-1-1-x: 0/1 nodes",
    ),
    "no image for one": (
        (node(0, unschedulable="0/1 nodes"), node(1, waiting_reason="ErrImagePull", waiting_message="denied")),
        "ImagePullFailed",
        "0/2 pods ready; pod bot-train-1-1-x: ErrImagePull: denied",
    ),
    "two problems that end it": (
        (node(0, waiting_reason="ErrImagePull"), node(1, waiting_reason="CreateContainerConfigError")),
        "ConfigError",
        "0/2 pods ready; pod bot-train-1-1-x: CreateContainerConfigError: ",
    ),
}


@pytest.mark.parametrize(("pods", "reason", "message"), NOT_YET.values(), ids=NOT_YET.keys())
def test_it_runs_only_when_all_do(pods: tuple[ObservedPod, ...], reason: str, message: str) -> None:
    """Until then it is Pending, with the number of pods that run and the problem of any other one."""
    status = decide(PAIR, created(), seen(*pods), NOW, SETTINGS).status
    assert status.phase == "Pending"
    assert pods_ready(status) == ("False", reason, message)


@pytest.mark.parametrize("second", [running(1), end(1, 0)], ids=["both", "the follower is done"])
def test_all_run(second: ObservedPod) -> None:
    """Progress is that of the first pod; a follower that is done while it publishes is no failure."""
    progress = Progress(stage="Training", step=3, updated_at=TIME)
    status = decide(PAIR, created(), seen(running(0), second, progress=progress), NOW, SETTINGS).status
    assert (status.phase, status.progress, status.start_time) == ("Running", progress, TIME)
    assert pods_ready(status) == ("True", "AllReady", "2/2 pods ready")


def test_a_pod_that_cannot_start_ends_it() -> None:
    """One missing Secret is enough, and the Service goes with the Job."""
    stuck = node(1, waiting_reason="CreateContainerConfigError", waiting_message="no Secret")
    grace = SETTINGS.config_error_grace_seconds
    assert decide(PAIR, created(), seen(running(0), stuck), later(grace - 1), SETTINGS).action is None
    decision = decide(PAIR, created(), seen(running(0), stuck), later(grace), SETTINGS)
    assert decision.action == DELETED
    assert decision.status.failure is not None
    assert decision.status.failure.message == "pod bot-train-1-1-x: CreateContainerConfigError: no Secret"


def test_a_job_that_lacks_pods_gets_a_hint() -> None:
    """A quota may let the first pod through, and not the second."""
    status = decide(PAIR, created(), seen(running(0)), later(61), SETTINGS).status
    assert "1/2 pods ready; Job bot-train-1 has 1 of 2 pods yet: `kubectl describe job" in pods_ready(status)[2]


def test_the_end_of_one_pod_waits_for_the_end_of_the_job() -> None:
    """Kubernetes ends the others first; nothing is decided, and nothing deleted, until then."""
    for pods in ((running(0), end(1, 1)), (running(0, **removed(5)), end(1, 1)), (end(0, 0), running(1))):
        decision = decide(PAIR, created(), seen(*pods), later(70), SETTINGS)
        assert (decision.action, decision.status.attempts) == (None, [])


def test_success_is_the_first_pod_s() -> None:
    """Its report counts, whatever the followers say; every pod's GPUs are counted."""
    follower = json.dumps({"exitCode": 0, "reason": "TookPart", "message": "pod 0 reports the result"})
    pods = (end(0, 0, report=json.dumps(REPORT)), end(1, 0, report=follower))
    status = decide(PAIR, created(), seen(*pods, job=replace(JOB, finished="Complete")), later(90), SETTINGS).status
    assert (status.phase, status.run_key) == ("Complete", REPORT["runKey"])
    assert status.usage is not None
    assert status.usage.gpu_seconds == 2 * 2 * 60
    swapped = (replace(pods[0], report=follower), replace(pods[1], report=json.dumps(REPORT)))
    status = decide(PAIR, created(), seen(*swapped, job=replace(JOB, finished="Complete")), later(90), SETTINGS).status
    assert status.attempts[-1].cause == "OutputMissing"


OOM: dict[str, Any] = {"termination_reason": "OOMKilled"}
DATA: dict[str, Any] = {"report": json.dumps({"exitCode": 20, "reason": "InvalidData", "message": "line 7"})}
GPU: dict[str, Any] = {"report": json.dumps({"exitCode": 22, "reason": "GpuOutOfMemory", "message": "m"})}

# the pods, the cause, the node that is to blame, whether the restart is free (None: there is none)
ENDS: dict[str, tuple[tuple[ObservedPod, ...], str, int, bool | None]] = {
    "memory": ((end(0, second=2, **PEER_LOST), end(1, 137, 0, **OOM)), "OutOfMemory", 1, False),
    "memory, but the other one was faster": (
        (end(0, second=0, **PEER_LOST), end(1, 137, 3, **OOM, **removed(1))),
        "OutOfMemory",
        1,
        False,
    ),
    "GPU memory, and the report took its time": (
        (end(0, second=0, **PEER_LOST), end(1, 22, 9, **GPU, **removed(1))),
        "GpuOutOfMemory",
        1,
        False,
    ),
    "the first of two causes": ((end(0, 22, 5, **GPU), end(1, 137, 4, **OOM)), "OutOfMemory", 1, False),
    "the first of two causes, by node": ((end(0, 22, 4, **GPU), end(1, 137, 5, **OOM)), "GpuOutOfMemory", 0, False),
    "bad data, and the other one removed": (
        (end(0, 20, 0, **DATA), end(1, 25, 2, **removed(1))),
        "InvalidData",
        0,
        None,
    ),
    "removed without a word": ((end(0, 1, 0), end(1, 137, 61, **removed(1))), "InternalError", 0, False),
    "deleted by hand": ((end(0, second=2, **PEER_LOST), end(1, 25, 3, **removed(0))), "PodDeleted", 1, True),
    "deleted in the second of the other's end": (
        (end(0, second=0, **PEER_LOST), end(1, 25, 2, **removed(0))),
        "PodDeleted",
        1,
        True,
    ),
    "failed in the second of the other's removal": (
        (end(0, 1, 0), end(1, 25, 2, **removed(0))),
        "InternalError",
        0,
        False,
    ),
    "deleted at once": (
        (end(0, second=2, **PEER_LOST), node(1, gone=True, node="b", phase="Running", running=True, **removed(0, 0))),
        "PodDeleted",
        1,
        True,
    ),
    "evicted": (
        (end(0, second=0, **PEER_LOST), end(1, 143, 3, disruption="Evicted", **removed(1))),
        "Evicted",
        1,
        True,
    ),
    "nobody says why": ((end(0, second=2, **PEER_LOST), end(1, second=1, **PEER_LOST)), "PeerLost", 1, False),
    "nobody but one that was removed": (
        (end(0, second=0, **PEER_LOST), end(1, 25, 2, **removed(1))),
        "PodDeleted",
        1,
        True,
    ),
    "removed after its end": ((end(0, 137, 0, **removed(5)), end(1, second=2, **PEER_LOST)), "Killed", 0, False),
    "a follower was done": ((end(0, 1, 5), end(1, 0, 3)), "InternalError", 0, False),
    "one never ran": ((end(0, 20, 0, **DATA), node(1, gone=True, **removed(1, 0))), "InvalidData", 0, None),
    "all deleted at once": ((end(0, 25, 3, **removed(0)), end(1, 25, 2, **removed(0))), "PodDeleted", 1, True),
    "one is all there is": ((end(1, 1, 0),), "InternalError", 1, False),
}


@pytest.mark.parametrize(("pods", "cause", "blamed", "free"), ENDS.values(), ids=ENDS.keys())
def test_whose_end_is_the_cause(pods: tuple[ObservedPod, ...], cause: str, blamed: int, free: bool | None) -> None:
    """That of the pod that failed first for a reason of its own; those that it took with it are not to blame."""
    status = decide(PAIR, created(), seen(*pods, job=replace(JOB, finished="Failed")), later(90), SETTINGS).status
    attempt = status.attempts[-1]
    assert attempt.cause == cause
    assert attempt.message.startswith(f"node {blamed}: ")
    assert attempt.node == next(one.node for one in pods if one.index == blamed)
    expected = {None: (0, 0), True: (0, 1), False: (1, 0)}[free]
    assert (status.restarts, status.free_restarts) == expected
    assert (status.phase == "Failed") == (free is None)


@pytest.mark.parametrize(
    ("leader", "follower"),
    [
        (end(0, 25, 2, **removed(2)), end(1, 25, 2, **removed(1))),
        # The kubelet moves the time of a deletion to its end, with no grace.
        (end(0, 25, 2, **removed(2)), end(1, 25, 2, **removed(3, 0))),
        (end(0, 25, 2, **removed(3, 0)), end(1, 25, 2, **removed(3, 0))),
        (end(0, second=2, **PEER_LOST), end(1, 25, 2, **removed(3, 0))),
    ],
)
@pytest.mark.parametrize("named", [0, 1])
def test_of_one_second_the_pod_that_the_job_names(leader: ObservedPod, follower: ObservedPod, named: int) -> None:
    """Kubernetes tells times in whole seconds; which pod made the Job fail it says by name."""
    message = (
        f"Container trainer for pod a/bot-train-1-{named}-x failed with exit code 25 matching FailJob rule at index 1"
    )
    failed = replace(JOB, finished="Failed", message=message)
    attempt = decide(PAIR, created(), seen(leader, follower, job=failed), later(90), SETTINGS).status.attempts[-1]
    blamed = 1 if leader.exit_code == 1 else named
    assert (attempt.cause, attempt.message) == ("PodDeleted", f"node {blamed}: pod bot-train-1-{blamed}-x was deleted")


def test_no_pod_is_left() -> None:
    """Then the Job's own words are all there is."""
    gone = seen(job=replace(JOB, finished="Failed", message="Job has failed"))
    attempt = decide(PAIR, created(), gone, later(90), SETTINGS).status.attempts[-1]
    assert (attempt.cause, attempt.message) == ("PodDeleted", "Job has failed")


def test_a_lost_node_ends_it() -> None:
    """Its peer only lost the connection; the Job waits for a pod that nobody ends, so the operator does not."""
    pods = (end(0, second=0, **PEER_LOST), running(1, node="b", **removed(1, 9)))
    limit = 70 + SETTINGS.node_lost_grace_seconds
    assert decide(PAIR, created(), seen(*pods), later(limit - 1), SETTINGS).action is None
    decision = decide(PAIR, created(), seen(*pods), later(limit), SETTINGS)
    assert decision.action == DELETED
    attempt = decision.status.attempts[-1]
    assert (attempt.cause, attempt.node) == ("NodeLost", "b")
    assert "node b does not answer" in attempt.message


def test_a_cause_comes_before_a_node_that_is_lost_meanwhile() -> None:
    """What happened first is the cause, and what is wrong for good fails the run."""
    pods = (end(0, 20, 0, **DATA), running(1, node="b", **removed(1, 9)))
    status = decide(PAIR, created(), seen(*pods), later(200), SETTINGS).status
    assert (status.phase, status.attempts[-1].cause) == ("Failed", "InvalidData")


def test_a_pod_without_a_node_goes_with_the_one_that_failed() -> None:
    """It is gone in a moment, and the Job with the log of the other one stays."""
    pods = (end(0, 1, 0), node(1, **removed(1, 0)))
    assert decide(PAIR, created(), seen(*pods), later(62), SETTINGS).action is None


def test_the_service_goes_with_the_job() -> None:
    """When it is suspended, given up, or over for long; and when somebody deletes the Job alone."""
    pods = (running(0), running(1))
    suspended = finetunejob(suspend=True, resources={"nodes": 2})
    assert decide(suspended, created(), seen(*pods), NOW, SETTINGS).action == DELETED
    limited = finetunejob(resources={"nodes": 2}, retry={"timeouts": {"run": "12s"}})
    assert decide(limited, created(start_time=TIME), seen(*pods), later(12), SETTINGS).action == DELETED
    alone = decide(PAIR, created(), ObservedRun(job_gone=True), NOW, SETTINGS)
    assert alone.action == DeleteJobs((), ("ftj-bot-train-1",))
    assert alone.status.attempts[-1].cause == "JobDeleted"
    over = decide(with_ttl(), done(), ObservedRun(jobs=("bot-train-1", "bot-train-2")), later(7200), SETTINGS)
    assert over.action == DeleteJobs(("bot-train-1", "bot-train-2"), ("ftj-bot-train-1", "ftj-bot-train-2"))


def with_ttl() -> FineTuneJob:
    """Return a run on two nodes whose Jobs go after an hour."""
    return finetunejob(resources={"nodes": 2}, ttlAfterFinished="1h")


def done() -> RunStatus:
    """Return the status of a run that has succeeded."""
    pods = (end(0, 0, report=json.dumps(REPORT)), end(1, 0))
    return decide(PAIR, created(), seen(*pods, job=replace(JOB, finished="Complete")), later(90), SETTINGS).status
