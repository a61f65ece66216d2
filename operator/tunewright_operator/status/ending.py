"""The end of an attempt and of a run: history, usage, restarts, terminal conditions. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from tunewright_api.conditions import ConditionType, Reason
from tunewright_api.exit_codes import Fate
from tunewright_api.run_report import Progress, RunReport
from tunewright_api.v1alpha1.finetunejob import Retry
from tunewright_api.v1alpha1.status import MAX_ATTEMPTS_KEPT, Attempt, Failure, RunStatus, Usage
from tunewright_operator.kinds import Spec
from tunewright_operator.needs import gpus_of
from tunewright_operator.observed import ObservedPod, parse_time
from tunewright_operator.settings import Settings
from tunewright_operator.status import by_kind
from tunewright_operator.status.memory import (
    GPU_OUT_OF_MEMORY,
    MAX_MESSAGE,
    current_attempt,
    halvings,
    mark,
    timestamp,
)
from tunewright_operator.status.verdict import Verdict

MAX_FREE_RESTARTS = 20
"""Attempts that the platform may end before the run fails: a cluster that never lets it finish is no place for it."""
MAX_BACKOFF_SECONDS = 300.0


def end_attempt(
    status: RunStatus,
    verdict: Verdict,
    pods: Sequence[ObservedPod],
    spec: Spec,
    settings: Settings,
    now: datetime.datetime,
) -> RunStatus:
    """Record the end of the current attempt and what follows: success, another attempt, or the end."""
    ended = record_attempt(status, verdict, pods, spec, now)
    if verdict.fate is Fate.SUCCEEDED:
        assert verdict.report is not None
        return _succeed(ended, verdict, verdict.report, now)
    if verdict.fate is Fate.FATAL:
        return fail(ended, verdict.cause, verdict.message, now, exit_code=verdict.exit_code)
    if verdict.cause == GPU_OUT_OF_MEMORY and by_kind.micro_batch(ended, halvings(ended) - 1) == 1:
        message = f"{verdict.message} (micro-batch 1 already: lower hyperparameters.maxSequenceLength, or use QLoRA)"
        return fail(ended, verdict.cause, message, now, exit_code=verdict.exit_code)
    return _restart(ended, verdict, spec.retry or Retry(), settings, now)


def record_attempt(
    status: RunStatus,
    verdict: Verdict,
    pods: Sequence[ObservedPod],
    spec: Spec,
    now: datetime.datetime,
) -> RunStatus:
    """Add the current attempt to the history and its cost to the usage."""
    times = [(pod.started_at, pod.ended_at or timestamp(now)) for pod in pods]
    about = verdict.pod or next(iter(pods), None)
    step = verdict.report.step if verdict.report else status.progress.step if status.progress else None
    attempt = Attempt(
        number=current_attempt(status),
        cause=verdict.cause,
        exit_code=verdict.exit_code,
        node=about.node if about else None,
        last_step=step,
        start_time=min((started for started, _ in times if started is not None), default=None),
        end_time=max((ended for _, ended in times), default=timestamp(now)),
        message=verdict.message[:MAX_MESSAGE],
    )
    seconds = sum(
        max(0.0, (parse_time(ended) - parse_time(started)).total_seconds())
        for started, ended in times
        if started is not None
    )
    used = round(seconds * gpus_of(spec))
    before = status.usage or Usage()
    lost = 0 if verdict.fate is Fate.SUCCEEDED else used
    usage = Usage(gpu_seconds=before.gpu_seconds + used, lost_gpu_seconds=before.lost_gpu_seconds + lost)
    return status.model_copy(
        update={
            "attempt": attempt.number,
            "attempts": [*status.attempts, attempt][-MAX_ATTEMPTS_KEPT:],
            "usage": usage,
            "job_ref": None,
        }
    )


def fail(
    status: RunStatus, reason: str, message: str, now: datetime.datetime, *, exit_code: int | None = None
) -> RunStatus:
    """Return the status of a run that has failed for good."""
    marked = mark(
        status,
        now,
        (ConditionType.PODS_READY, False, reason, ""),
        (ConditionType.COMPLETE, False, reason, ""),
        (ConditionType.FAILED, True, reason, message),
        (ConditionType.READY, False, reason, message),
        (ConditionType.STALLED, True, reason, message),
    )
    return marked.model_copy(
        update={
            "phase": "Failed",
            "completion_time": timestamp(now),
            "next_attempt_time": None,
            "failure": Failure(reason=reason, message=message[:MAX_MESSAGE], exit_code=exit_code),
        }
    )


def _succeed(status: RunStatus, verdict: Verdict, report: RunReport, now: datetime.datetime) -> RunStatus:
    assert report.output is not None
    where = f"the result is at {report.output.uri}"
    marked = mark(
        status,
        now,
        (ConditionType.PODS_READY, False, verdict.cause, ""),
        (ConditionType.COMPLETE, True, verdict.cause, verdict.message or where),
        (ConditionType.FAILED, False, verdict.cause, ""),
        (ConditionType.READY, True, Reason.ARTIFACT_PUBLISHED, where),
        (ConditionType.STALLED, False, verdict.cause, ""),
    )
    return marked.model_copy(
        update={
            "phase": "Complete",
            "completion_time": timestamp(now),
            "next_attempt_time": None,
            "progress": _final_progress(status.progress, report, now),
            "run_key": report.run_key,
            "output": report.output,
            "failure": None,
            **by_kind.results(status, report),
        }
    )


def _final_progress(last: Progress | None, report: RunReport, now: datetime.datetime) -> Progress:
    before = last or Progress(stage="Finished", updated_at=timestamp(now))
    return before.model_copy(
        update={
            "stage": "Finished",
            "step": report.step,
            "total_steps": report.total_steps if report.total_steps is not None else before.total_steps,
            "percent": 100.0,
            "loss": _shown(report.loss if report.loss is not None else before.loss),
            "eval_loss": _shown(report.evaluation.tuned if report.evaluation else before.eval_loss),
            "eta_seconds": 0,
            "message": None,
            "updated_at": timestamp(now),
        }
    )


def _shown(loss: float | None) -> float | None:
    """Round a loss for people: it is a column of `kubectl get`."""
    return None if loss is None else round(loss, 4)


def _restart(
    status: RunStatus, verdict: Verdict, retry: Retry, settings: Settings, now: datetime.datetime
) -> RunStatus:
    counted = verdict.fate is Fate.COUNTED_RETRY
    used, limit = (status.restarts, retry.max_restarts) if counted else (status.free_restarts, MAX_FREE_RESTARTS)
    why = f"{verdict.cause}: {verdict.message}"
    if used >= limit:
        rule = "retry.maxRestarts" if counted else "the limit for attempts that the platform ends"
        message = f"{why} (restarts used up: {used} of {limit}, {rule})"
        return fail(status, Reason.BACKOFF_LIMIT_EXCEEDED, message, now, exit_code=verdict.exit_code)
    wait = min(settings.backoff_seconds * 2**used, MAX_BACKOFF_SECONDS)
    marked = mark(status, now, (ConditionType.PODS_READY, False, Reason.RESTARTING, why))
    return marked.model_copy(
        update={
            "phase": "Restarting",
            "restarts" if counted else "free_restarts": used + 1,
            "next_attempt_time": timestamp(now + datetime.timedelta(seconds=wait)),
            "progress": None,
        }
    )
