"""`decide`: the whole behaviour of a workload, read top to bottom. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Literal

from tunewright_api.base import seconds_of
from tunewright_api.conditions import ConditionType, Reason, is_true
from tunewright_api.exit_codes import Fate
from tunewright_api.v1alpha1.finetunejob import Timeouts
from tunewright_api.v1alpha1.status import JobRef, RunStatus
from tunewright_operator import naming
from tunewright_operator.kinds import Spec, Workload, kind_of
from tunewright_operator.needs import nodes_of
from tunewright_operator.observed import ObservedJob, ObservedRun, Refusal
from tunewright_operator.settings import Settings
from tunewright_operator.status import by_kind, ending, pods, references, verdict
from tunewright_operator.status.decision import CreateJob, Decision, DeleteJobs
from tunewright_operator.status.memory import (
    current_attempt,
    halvings,
    is_finished,
    mark,
    reason_of,
    seconds_until,
    timestamp,
)

_WAIT_FOR_OTHERS_SECONDS = 5.0
"""Between looks at something that ends by itself soon and whose end a watch may not show."""
_NO_POD_SECONDS = 60.0
"""After this time a Job that lacks pods is worth a hint."""


def decide(
    workload: Workload, previous: RunStatus, seen: ObservedRun, now: datetime.datetime, settings: Settings
) -> Decision:
    """Return what to do and the new status.

    Called again with what came of it after a `CreateJob`; a `DeleteJobs` goes with the status that is right once the
    Jobs are gone. Deciding twice from the same state gives the same result.
    """
    if is_finished(previous):
        return _clean_up(workload.spec, previous, seen, now)
    status = references.take_over(workload.spec, _visited(workload, previous, now), seen.references)
    if not workload.spec.suspend:
        status = _resumed(status, now)
    if _run_deadline_passed(workload.spec, status, now):
        return _deadline_exceeded(workload.spec, status, seen, now, "timeouts.run", _timeouts(workload.spec).run)
    if seen.job is not None and seen.job.finished:
        ended = _ended(workload.spec, status, seen.job, seen, settings, now)
        if is_finished(ended.status) or not workload.spec.suspend:
            return ended
        return _suspended(workload.spec, ended.status, ObservedRun(), now)
    if workload.spec.suspend:
        return _suspended(workload.spec, status, seen, now)
    if seen.job is not None:
        return _live(workload.spec, status, seen.job, seen, settings, now)
    if seen.job_gone:
        name = naming.job_name(kind_of(workload), workload.metadata.name, current_attempt(status))
        status = ending.end_attempt(status, verdict.judge_missing_job(name), (), workload.spec, settings, now)
        services = _services(workload.spec, name)
        return _after(status, now, DeleteJobs((), services) if services else None)
    return _next_attempt(status, seen, now)


def refuse_spec(
    previous: RunStatus, generation: int | None, problems: Sequence[str], now: datetime.datetime
) -> RunStatus:
    """Return the status of a workload whose spec cannot work; all problems are in the message."""
    if is_finished(previous):
        return previous
    message = "; ".join(problems)
    status = previous.model_copy(update={"observed_generation": generation})
    status = mark(status, now, (ConditionType.ACCEPTED, False, Reason.INVALID_SPEC, message))
    return ending.fail(status, Reason.INVALID_SPEC, message, now)


def _visited(workload: Workload, previous: RunStatus, now: datetime.datetime) -> RunStatus:
    stage = kind_of(workload).stage.capitalize()
    status = previous.model_copy(update={"observed_generation": workload.metadata.generation, "stage": stage})
    if status.phase is None:
        status = status.model_copy(update={"plan": by_kind.first_plan(workload.spec), "phase": "Pending"})
    return mark(status, now, (ConditionType.ACCEPTED, True, Reason.VALIDATED, ""))


def _clean_up(spec: Spec, status: RunStatus, seen: ObservedRun, now: datetime.datetime) -> Decision:
    """Remove the Jobs of a finished run when its time has come; the status never changes again."""
    if spec.ttl_after_finished is None or status.completion_time is None or not seen.jobs:
        return Decision(status)
    wait = seconds_until(status.completion_time, now) + seconds_of(spec.ttl_after_finished)
    if wait > 0:
        return Decision(status, requeue_seconds=wait)
    return Decision(status, DeleteJobs(seen.jobs, _services(spec, *seen.jobs)))


def _timeouts(spec: Spec) -> Timeouts:
    return (spec.retry.timeouts if spec.retry else None) or Timeouts()


def _run_deadline_passed(spec: Spec, status: RunStatus, now: datetime.datetime) -> bool:
    limit = _timeouts(spec).run
    if limit is None or status.start_time is None or spec.suspend:
        return False
    return seconds_until(status.start_time, now) + seconds_of(limit) <= 0


def _deadline_exceeded(
    spec: Spec,
    status: RunStatus,
    seen: ObservedRun,
    now: datetime.datetime,
    field: Literal["timeouts.queue", "timeouts.run"],
    limit: str | None,
) -> Decision:
    message = f"not done within retry.{field} of {limit}: raise it, or make the run shorter"
    return _give_up(spec, status, seen, Reason.DEADLINE_EXCEEDED, message, now)


def _give_up(
    spec: Spec,
    status: RunStatus,
    seen: ObservedRun,
    reason: str,
    message: str,
    now: datetime.datetime,
) -> Decision:
    """Fail a run whose pod may still be there."""
    if seen.job is not None:
        ruling = verdict.Verdict(reason, Fate.FATAL, message)
        status = ending.record_attempt(status, ruling, seen.pods, spec, now)
    return Decision(ending.fail(status, reason, message, now), _delete(spec, seen.job))


def _delete(spec: Spec, job: ObservedJob | None) -> DeleteJobs | None:
    if job is None or job.deleting:
        return None
    return DeleteJobs((job.name,), _services(spec, job.name))


def _services(spec: Spec, *jobs: str) -> tuple[str, ...]:
    """Return the names of the Services that belong to Jobs."""
    return tuple(naming.service_name(job) for job in jobs) if nodes_of(spec) > 1 else ()


def _ended(
    spec: Spec,
    status: RunStatus,
    job: ObservedJob,
    seen: ObservedRun,
    settings: Settings,
    now: datetime.datetime,
) -> Decision:
    if status.start_time is None:
        status = status.model_copy(update={"start_time": _first_start(seen)})
    if job.finished == "Complete":
        ruling = verdict.judge_success(seen.pod)
    else:
        ruling = verdict.judge_failure(job, seen.pods, by_kind.over_memory(spec, settings))
    return _after(ending.end_attempt(status, ruling, seen.pods, spec, settings, now), now)


def _first_start(seen: ObservedRun) -> str | None:
    return min((pod.started_at for pod in seen.pods if pod.started_at is not None), default=None)


def _after(status: RunStatus, now: datetime.datetime, action: DeleteJobs | None = None) -> Decision:
    """Return the decision that goes with the end of an attempt."""
    if status.next_attempt_time is None:
        return Decision(status, action, 0.0 if not is_finished(status) else None)
    return Decision(status, action, max(0.0, seconds_until(status.next_attempt_time, now)))


def _suspended(spec: Spec, status: RunStatus, seen: ObservedRun, now: datetime.datetime) -> Decision:
    started = status.job_ref is not None or seen.job is not None
    if started:
        ruling = verdict.Verdict(Reason.USER_SUSPENDED, Fate.FREE_RETRY, "suspended by spec.suspend")
        status = ending.record_attempt(status, ruling, seen.pods, spec, now)
    status = mark(
        status,
        now,
        (ConditionType.SUSPENDED, True, Reason.USER_SUSPENDED, "set spec.suspend to false to go on"),
        (ConditionType.PODS_READY, False, Reason.USER_SUSPENDED, ""),
    )
    status = status.model_copy(update={"phase": "Suspended", "next_attempt_time": None, "progress": None})
    return Decision(status, _delete(spec, seen.job))


def _resumed(status: RunStatus, now: datetime.datetime) -> RunStatus:
    if not is_true(status.conditions, ConditionType.SUSPENDED):
        return status
    status = mark(
        status,
        now,
        (ConditionType.SUSPENDED, False, Reason.RESUMED, ""),
        (ConditionType.PODS_READY, False, Reason.PENDING, ""),
    )
    return status.model_copy(update={"phase": "Pending"})


def _live(
    spec: Spec,
    status: RunStatus,
    job: ObservedJob,
    seen: ObservedRun,
    settings: Settings,
    now: datetime.datetime,
) -> Decision:
    """A Job that has not ended: name what its pods wait for, take over progress, keep the time limits."""
    status = status.model_copy(
        update={
            "attempt": current_attempt(status),
            "job_ref": JobRef(name=job.name, uid=job.uid),
            "next_attempt_time": None,
        }
    )
    failed = any(pod.ended and not pod.ready for pod in seen.pods)
    leaving = [
        # Without a node there is nobody to wait for, unless another pod's end takes this one with it.
        (seconds_until(pod.deletion_time, now) + (settings.node_lost_grace_seconds if pod.node or failed else 0), pod)
        for pod in seen.pods
        if pod.deletion_time is not None and not pod.terminal
    ]
    if leaving:
        lost_in, lost = min(leaving, key=lambda pair: pair[0])
        if lost_in > 0:
            return Decision(status, requeue_seconds=lost_in)
        ruling = verdict.judge_failure(job, seen.pods, by_kind.over_memory(spec, settings), lost)
        return _after(ending.end_attempt(status, ruling, seen.pods, spec, settings, now), now, _delete(spec, job))
    if failed or (seen.pod is not None and seen.pod.ended):
        # The Job controller says so within a second or two, and its event brings us back.
        return Decision(status)
    if len(seen.pods) == job.completions and all(pod.ready for pod in seen.pods):
        return _running(spec, status, job, seen, settings, now)
    return _pending(spec, status, job, seen, settings, now)


def _running(
    spec: Spec,
    status: RunStatus,
    job: ObservedJob,
    seen: ObservedRun,
    settings: Settings,
    now: datetime.datetime,
) -> Decision:
    status = mark(status, now, (ConditionType.PODS_READY, True, Reason.ALL_READY, pods.with_count(job, seen.pods)))
    start = status.start_time or _first_start(seen) or timestamp(now)
    status = status.model_copy(update={"phase": "Running", "start_time": start})
    if seen.progress is not None:
        status = status.model_copy(update={"progress": seen.progress})
    waits = [settings.progress_interval_seconds]
    limit = _timeouts(spec).run
    if limit is not None:
        waits.append(max(0.0, seconds_until(start, now) + seconds_of(limit)))
    return Decision(status, requeue_seconds=min(waits))


def _pending(
    spec: Spec,
    status: RunStatus,
    job: ObservedJob,
    seen: ObservedRun,
    settings: Settings,
    now: datetime.datetime,
) -> Decision:
    waits = []
    limit = _timeouts(spec).queue
    if limit is not None:
        left = seconds_until(job.created, now) + seconds_of(limit)
        if left <= 0:
            return _deadline_exceeded(spec, status, seen, now, "timeouts.queue", limit)
        waits.append(left)
    reason, message, final_in = pods.problem(seen.pods, settings, now)
    if final_in is not None:
        if final_in <= 0:
            return _give_up(spec, status, seen, reason, message, now)
        waits.append(final_in)
    if len(seen.pods) < job.completions:
        left = seconds_until(job.created, now) + _NO_POD_SECONDS
        if left > 0:
            waits.append(left)
        elif not message:
            which = "no pod" if not seen.pods else f"{len(seen.pods)} of {job.completions} pods"
            message = (
                f"Job {job.name} has {which} yet: `kubectl describe job {job.name}` says why "
                "(quota, Pod Security, a missing ServiceAccount)"
            )
    message = pods.with_count(job, seen.pods, message)
    status = mark(status, now, (ConditionType.PODS_READY, False, reason, message))
    return Decision(status.model_copy(update={"phase": "Pending"}), requeue_seconds=min(waits, default=None))


def _next_attempt(status: RunStatus, seen: ObservedRun, now: datetime.datetime) -> Decision:
    if seen.refusal is not None:
        return _refused(status, seen.refusal, now)
    if status.next_attempt_time is not None:
        wait = seconds_until(status.next_attempt_time, now)
        if wait > 0:
            return Decision(status, requeue_seconds=wait)
    if seen.earlier_pods:
        # Two pods of one run at once would be twice the GPUs, and two writers.
        message = f"waiting for the end of {', '.join(seen.earlier_pods)} of an earlier attempt"
        status = mark(status, now, (ConditionType.PODS_READY, False, Reason.RESTARTING, message))
        return Decision(status, requeue_seconds=_WAIT_FOR_OTHERS_SECONDS)
    waiting = references.wait(status, seen.references, now)
    if waiting is not None:
        return waiting
    return Decision(status, CreateJob(current_attempt(status), halvings(status)))


def _refused(status: RunStatus, refusal: Refusal, now: datetime.datetime) -> Decision:
    match refusal.kind:
        case "Foreign":
            return Decision(ending.fail(status, Reason.NAME_CONFLICT, refusal.message, now))
        case "Invalid":
            return Decision(refuse_spec(status, status.observed_generation, [refusal.message], now))
        case "Predecessor":
            marked = mark(status, now, (ConditionType.PODS_READY, False, Reason.PENDING, refusal.message))
            return Decision(marked, requeue_seconds=_WAIT_FOR_OTHERS_SECONDS)
        case "Forbidden":
            repeated = reason_of(status, ConditionType.PODS_READY) == Reason.FORBIDDEN
            marked = mark(status, now, (ConditionType.PODS_READY, False, Reason.FORBIDDEN, refusal.message))
            return Decision(marked, requeue_seconds=60.0 if repeated else 10.0)
