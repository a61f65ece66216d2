"""`decide`: each situation, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.operator.builders import (
    BOTH_KINDS,
    NOW,
    REPORT,
    SETTINGS,
    TIME,
    Build,
    created,
    ended_pod,
    failed,
    finetunejob,
    job,
    later,
    pod,
    succeeded,
)
from tunewright_api.conditions import ConditionType, find_condition
from tunewright_api.run_report import Progress
from tunewright_api.v1alpha1.status import Attempt, FineTuneJobStatus, RunStatus
from tunewright_operator.kinds import kind_of
from tunewright_operator.observed import ObservedRun, Refusal
from tunewright_operator.status import CreateJob, Decision, DeleteJobs, decide, refuse_spec, transition_events

EMPTY = FineTuneJobStatus()


def condition(status: RunStatus, kind: ConditionType = ConditionType.PODS_READY) -> tuple[str, str, str]:
    """Return status, reason and message of a condition."""
    found = find_condition(status.conditions, kind)
    assert found is not None
    return found.status, found.reason, found.message


def test_first_visit_creates_the_job() -> None:
    """A new FineTuneJob gets attempt 1, all conditions and the resolved plan."""
    decision = decide(finetunejob(), EMPTY, ObservedRun(), NOW, SETTINGS)
    assert decision.action == CreateJob(1, 0)
    assert {c.type for c in decision.status.conditions} == set(ConditionType)
    assert isinstance(decision.status, FineTuneJobStatus)
    assert decision.status.plan is not None
    assert decision.status.plan.hyperparameters["learningRate"] == 2e-4


def test_created_job_is_recorded() -> None:
    """With the Job there, nothing is left to do but to wait for its pod."""
    decision = decide(finetunejob(), EMPTY, ObservedRun(job=job()), NOW, SETTINGS)
    assert decision.action is None
    assert decision.status.job_ref is not None
    assert (decision.status.job_ref.name, decision.status.attempt) == ("bot-train-1", 1)
    assert condition(decision.status)[:2] == ("False", "WaitingForPods")


WAITING: dict[str, tuple[dict[str, Any], str]] = {
    "new": ({}, "WaitingForPods"),
    "no node": ({"unschedulable": "0/3 nodes"}, "Unschedulable"),
    "pull": ({"waiting_reason": "ErrImagePull", "waiting_message": "denied"}, "ImagePullFailed"),
    "pull again": ({"waiting_reason": "ImagePullBackOff"}, "ImagePullFailed"),
    "image name": ({"waiting_reason": "InvalidImageName"}, "ImagePullFailed"),
    "secret": ({"waiting_reason": "CreateContainerConfigError"}, "ConfigError"),
    "starting": ({"waiting_reason": "ContainerCreating"}, "WaitingForPods"),
}


@BOTH_KINDS
@pytest.mark.parametrize(("changes", "reason"), WAITING.values(), ids=WAITING.keys())
def test_why_a_pod_waits(build: Build, changes: dict[str, Any], reason: str) -> None:
    """What keeps a pod from running is the reason of PodsReady."""
    decision = decide(build(), created(build), ObservedRun(job=job(), pod=pod(**changes)), NOW, SETTINGS)
    assert condition(decision.status)[1] == reason
    assert decision.status.phase == "Pending"
    assert decision.action is None


@BOTH_KINDS
@pytest.mark.parametrize(
    ("changes", "grace"),
    [
        ({"waiting_reason": "CreateContainerConfigError"}, SETTINGS.config_error_grace_seconds),
        ({"waiting_reason": "ImagePullBackOff"}, SETTINGS.image_pull_grace_seconds),
    ],
)
def test_a_pod_that_cannot_start_is_given_up(build: Build, changes: dict[str, Any], grace: float) -> None:
    """After the grace period, and not before, the run fails and its Job goes."""
    seen = ObservedRun(job=job(), pod=pod(scheduled_at=TIME, **changes))
    before = decide(build(), created(build), seen, later(grace - 1), SETTINGS)
    assert (before.action, before.requeue_seconds) == (None, 1)
    after = decide(build(), created(build), seen, later(grace), SETTINGS)
    assert after.action == DeleteJobs(("bot-train-1",))
    assert after.status.phase == "Failed"


def test_a_job_without_a_pod_gets_a_hint() -> None:
    """A Job whose pod is refused says nothing itself; after a minute the condition says where to look."""
    decision = decide(finetunejob(), created(), ObservedRun(job=job()), later(61), SETTINGS)
    assert "kubectl describe job bot-train-1" in condition(decision.status)[2]


@BOTH_KINDS
def test_running(build: Build) -> None:
    """A running pod makes PodsReady true and sets the start; the pod's progress is taken over."""
    progress = Progress(stage="Training", step=3, updated_at=TIME)
    seen = ObservedRun(job=job(), pod=pod(phase="Running", running=True, started_at=TIME), progress=progress)
    decision = decide(build(), created(build), seen, later(5), SETTINGS)
    assert condition(decision.status)[0] == "True"
    assert (decision.status.phase, decision.status.start_time) == ("Running", TIME)
    assert decision.status.progress == progress
    assert decision.requeue_seconds == SETTINGS.progress_interval_seconds


def test_success() -> None:
    """A complete Job with a report makes the run complete, ready, and final."""
    decision = decide(finetunejob(), created(), succeeded(), later(61), SETTINGS)
    status = decision.status
    assert (status.phase, status.run_key) == ("Complete", "0123456789abcdef")
    assert condition(status, ConditionType.READY)[:2] == ("True", "ArtifactPublished")
    assert status.usage is not None
    assert (status.usage.gpu_seconds, status.usage.lost_gpu_seconds) == (60, 0)
    assert decision.requeue_seconds is None


def test_an_early_stop_is_a_success() -> None:
    """It is Complete with a reason of its own, and the trainer's words on it."""
    report = json.dumps({**REPORT, "reason": "EarlyStopped", "message": "stopped early at step 4 of 10"})
    seen = ObservedRun(job=job(finished="Complete"), pod=ended_pod(0, report=report))
    status = decide(finetunejob(), created(), seen, later(61), SETTINGS).status
    assert status.phase == "Complete"
    complete = find_condition(status.conditions, ConditionType.COMPLETE)
    assert complete is not None
    assert (complete.reason, complete.message) == ("EarlyStopped", "stopped early at step 4 of 10")


# exit code, further facts of the pod -> cause, fate: final, counted, free
ENDS: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "input": (20, {}, "InvalidInput", "final"),
    "access": (21, {}, "AccessDenied", "final"),
    "diverged": (24, {}, "Diverged", "final"),
    "internal": (1, {}, "InternalError", "counted"),
    "unknown code": (77, {}, "InternalError", "counted"),
    "gpu": (22, {}, "GpuOutOfMemory", "counted"),
    "storage": (23, {}, "StorageUnavailable", "counted"),
    "stalled": (26, {}, "Stalled", "counted"),
    "killed": (137, {}, "Killed", "counted"),
    "oom": (137, {"termination_reason": "OOMKilled"}, "OutOfMemory", "counted"),
    "stopped": (25, {}, "Preempted", "free"),
    "deleted": (25, {"deletion_time": TIME}, "PodDeleted", "free"),
    "preempted": (25, {"disruption": "Preempted", "deletion_time": TIME}, "Preempted", "free"),
    "evicted": (143, {"disruption": "Evicted"}, "Evicted", "free"),
    "node lost": (143, {"disruption": "NodeLost"}, "NodeLost", "free"),
    "disk full": (137, {"status_reason": "Evicted"}, "Evicted", "counted"),
    "evicted after bad input": (20, {"disruption": "Evicted"}, "InvalidInput", "final"),
}


@BOTH_KINDS
@pytest.mark.parametrize(("code", "facts", "cause", "fate"), ENDS.values(), ids=ENDS.keys())
def test_how_an_attempt_ends(build: Build, code: int, facts: dict[str, Any], cause: str, fate: str) -> None:
    """The cause is named, and decides whether the run fails, restarts and counts it, or restarts for free."""
    status = decide(build(), created(build), failed(code, **facts), NOW, SETTINGS).status
    assert status.attempts[-1].cause == cause
    if fate == "final":
        assert status.failure is not None
        assert (status.phase, status.failure.reason) == ("Failed", cause)
    else:
        assert status.phase == "Restarting"
        assert (status.restarts, status.free_restarts) == ((1, 0) if fate == "counted" else (0, 1))


def test_out_of_memory_names_the_limit() -> None:
    """The message tells the limit that was in force, and the field to raise."""
    status = decide(
        finetunejob(resources={"memory": "3Gi"}), created(), failed(137, termination_reason="OOMKilled"), NOW, SETTINGS
    ).status
    assert "3Gi" in status.attempts[0].message
    assert "resources.memory" in status.attempts[0].message


@BOTH_KINDS
@pytest.mark.parametrize(("restarts", "wait"), [(0, 10), (1, 20), (4, 160), (5, 300), (20, 300)])
def test_backoff_doubles_up_to_five_minutes(build: Build, restarts: int, wait: int) -> None:
    """Each counted restart waits twice as long as the one before."""
    spec = build(retry={"maxRestarts": 99})
    status = decide(spec, created(build, restarts=restarts), failed(1), NOW, SETTINGS).status
    assert status.next_attempt_time == later(wait).strftime("%Y-%m-%dT%H:%M:%SZ")
    early = decide(spec, status, ObservedRun(), later(wait - 1), SETTINGS)
    assert (early.action, early.requeue_seconds) == (None, 1)
    assert decide(spec, status, ObservedRun(), later(wait), SETTINGS).action == CreateJob(2, 0)


@BOTH_KINDS
@pytest.mark.parametrize(
    ("used", "code", "rule"),
    [({"restarts": 3}, 1, "retry.maxRestarts"), ({"free_restarts": 20}, 25, "the platform ends")],
)
def test_restarts_run_out(build: Build, used: dict[str, int], code: int, rule: str) -> None:
    """Counted and free restarts are both bounded; the message keeps the last cause."""
    status = decide(build(), created(build, **used), failed(code), NOW, SETTINGS).status
    assert status.failure is not None
    assert status.failure.reason == "BackoffLimitExceeded"
    assert status.attempts[-1].cause in status.failure.message
    assert rule in status.failure.message


def test_gpu_memory_halves_the_micro_batch_until_one() -> None:
    """Each time the GPU runs out the micro-batch is halved; at one there is nothing left to halve."""
    spec = finetunejob(hyperparameters={"batchSize": 2})
    status = decide(spec, EMPTY, ObservedRun(job=job()), NOW, SETTINGS).status
    status = decide(spec, status, failed(22), NOW, SETTINGS).status
    assert decide(spec, status, ObservedRun(), later(60), SETTINGS).action == CreateJob(2, 1)
    second = decide(spec, status, replace(failed(22, 2), job=job(2, finished="Failed")), later(60), SETTINGS).status
    assert second.failure is not None
    assert second.failure.reason == "GpuOutOfMemory"
    assert "maxSequenceLength" in second.failure.message


@BOTH_KINDS
def test_a_missing_job_is_an_ended_attempt(build: Build) -> None:
    """A Job that is gone by a live read was deleted by somebody; the next attempt is free."""
    status = decide(build(), created(build), ObservedRun(job_gone=True), NOW, SETTINGS).status
    assert (status.attempts[0].cause, status.free_restarts, status.job_ref) == ("JobDeleted", 1, None)


@BOTH_KINDS
def test_earlier_pods_are_waited_for(build: Build) -> None:
    """The next attempt starts when no pod of an earlier one can run any more."""
    status = created(build, attempts=[Attempt(number=1, cause="Evicted")], job_ref=None)
    decision = decide(build(), status, ObservedRun(earlier_pods=("bot-train-1-x",)), NOW, SETTINGS)
    assert decision.action is None
    assert "bot-train-1-x" in condition(decision.status)[2]
    assert decision.requeue_seconds is not None


@BOTH_KINDS
def test_a_lost_node_ends_the_attempt(build: Build) -> None:
    """A deleted pod that nobody takes away is given up a while after its grace period."""
    seen = ObservedRun(job=job(), pod=pod(running=True, node="node1", deletion_time=TIME))
    assert decide(build(), created(build), seen, later(59), SETTINGS).action is None
    decision = decide(build(), created(build), seen, later(60), SETTINGS)
    assert decision.action == DeleteJobs(("bot-train-1",))
    assert decision.status.attempts[0].cause == "NodeLost"


@BOTH_KINDS
def test_suspend_deletes_the_job_and_ends_the_attempt(build: Build) -> None:
    """Suspending costs no restart; resuming begins the next attempt."""
    suspended = decide(build(suspend=True), created(build), ObservedRun(job=job(), pod=pod()), NOW, SETTINGS)
    assert suspended.action == DeleteJobs(("bot-train-1",))
    assert suspended.status.phase == "Suspended"
    again = decide(build(suspend=True), suspended.status, ObservedRun(), later(60), SETTINGS)
    assert again == Decision(suspended.status)
    resumed = decide(build(), suspended.status, ObservedRun(), later(120), SETTINGS)
    assert resumed.action == CreateJob(2, 0)
    assert condition(resumed.status, ConditionType.SUSPENDED)[:2] == ("False", "Resumed")
    assert (resumed.status.restarts, resumed.status.free_restarts) == (0, 0)


@BOTH_KINDS
def test_a_run_that_ended_before_it_was_suspended_has_ended(build: Build) -> None:
    """The end of a Job comes before the wish to suspend it."""
    assert decide(build(suspend=True), created(build), succeeded(), NOW, SETTINGS).status.phase == "Complete"


@BOTH_KINDS
@pytest.mark.parametrize(("kind", "status", "started"), [("queue", "Pending", None), ("run", "Running", TIME)])
def test_timeouts(build: Build, kind: str, status: str, started: str | None) -> None:
    """At the limit, and not before, the run fails and its Job goes; the next look is at the limit."""
    spec = build(retry={"timeouts": {kind: "12s"}})
    seen = ObservedRun(job=job(), pod=pod(running=started is not None, started_at=started))
    before = decide(spec, created(build, start_time=started), seen, later(10), SETTINGS)
    assert (before.action, before.requeue_seconds, before.status.phase) == (None, 2, status)
    after = decide(spec, created(build, start_time=started), seen, later(12), SETTINGS)
    assert after.action == DeleteJobs(("bot-train-1",))
    assert after.status.failure is not None
    assert after.status.failure.reason == "DeadlineExceeded"
    assert f"timeouts.{kind} of 12s" in after.status.failure.message


@BOTH_KINDS
def test_ttl(build: Build) -> None:
    """Jobs of a finished run go when their time has come; the status stays as it is."""
    done = decide(build(), created(build), succeeded(), NOW, SETTINGS).status
    seen = ObservedRun(jobs=("bot-train-1", "bot-train-2"))
    spec = build(ttlAfterFinished="1h")
    assert decide(spec, done, seen, later(600), SETTINGS) == Decision(done, requeue_seconds=3000)
    assert decide(spec, done, seen, later(3600), SETTINGS) == Decision(done, DeleteJobs(seen.jobs))
    assert decide(spec, done, ObservedRun(), later(3600), SETTINGS) == Decision(done)
    assert decide(build(), done, seen, later(3600), SETTINGS) == Decision(done)


@BOTH_KINDS
@pytest.mark.parametrize(
    ("refusal", "phase", "kind", "reason"),
    [
        ("Forbidden", "Pending", ConditionType.PODS_READY, "Forbidden"),
        ("Predecessor", "Pending", ConditionType.PODS_READY, "Pending"),
        ("Foreign", "Failed", ConditionType.FAILED, "NameConflict"),
        ("Invalid", "Failed", ConditionType.ACCEPTED, "InvalidSpec"),
    ],
)
def test_refused_jobs(build: Build, refusal: Any, phase: str, kind: ConditionType, reason: str) -> None:
    """A refusal that may pass is shown and tried again, another one ends the run."""
    seen = ObservedRun(refusal=Refusal(refusal, "because"))
    decision = decide(build(), kind_of(build()).status(), seen, NOW, SETTINGS)
    assert decision.status.phase == phase
    assert condition(decision.status, kind)[1:] == (reason, "because")
    assert (decision.requeue_seconds is None) == (phase == "Failed")


def test_invalid_spec_names_all_problems() -> None:
    """A spec that cannot be read fails the run with every problem; a finished run stays as it is."""
    status = refuse_spec(EMPTY, 3, ["spec.a: wrong", "spec.b: missing"], NOW)
    assert condition(status, ConditionType.ACCEPTED) == ("False", "InvalidSpec", "spec.a: wrong; spec.b: missing")
    assert condition(status, ConditionType.STALLED)[0] == "True"
    assert refuse_spec(status, 4, ["other"], later(1)) == status


def events(old: RunStatus, new: RunStatus) -> list[tuple[str, str]]:
    """Return type and reason of the events between two statuses."""
    return [(event.type, event.reason) for event in transition_events(old, new)]


@BOTH_KINDS
def test_events_tell_transitions_once(build: Build) -> None:
    """Every transition has one event, and a second look has none."""
    first = decide(build(), kind_of(build()).status(), ObservedRun(job=job()), NOW, SETTINGS).status
    stuck = decide(build(), first, ObservedRun(job=job(), pod=pod(unschedulable="no")), NOW, SETTINGS).status
    restarted = decide(build(), first, failed(1), NOW, SETTINGS).status
    suspended = decide(build(suspend=True), first, ObservedRun(), NOW, SETTINGS).status
    done = decide(build(), first, succeeded(), NOW, SETTINGS).status
    broken = decide(build(), first, failed(20), NOW, SETTINGS).status
    assert events(kind_of(build()).status(), first) == [("Normal", "JobCreated")]
    assert events(first, stuck) == [("Warning", "Unschedulable")]
    assert events(first, restarted) == [("Warning", "InternalError")]
    assert events(first, suspended) == [("Normal", "UserSuspended")]
    assert events(first, done) == [("Normal", "Succeeded")]
    assert events(first, broken) == [("Warning", "InvalidInput")]
    for status in (first, stuck, restarted, suspended, done, broken):
        assert events(status, status) == []


def test_history_and_usage_are_kept_bounded() -> None:
    """Ten attempts stay in the history; GPU seconds add up, lost ones apart."""
    status, spec = created(), finetunejob(retry={"maxRestarts": 99}, resources={"gpus": 1})
    for attempt in range(1, 13):
        seen = ObservedRun(job=job(attempt, finished="Failed"), pod=ended_pod(1, attempt))
        status = decide(spec, status, seen, NOW, SETTINGS).status
    assert [a.number for a in status.attempts] == list(range(3, 13))
    assert status.usage is not None
    assert (status.usage.gpu_seconds, status.usage.lost_gpu_seconds) == (720, 720)
