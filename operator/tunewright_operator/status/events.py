"""Kubernetes events: one per transition, found by comparing two statuses. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunewright_api.conditions import Condition, ConditionType, Reason, find_condition, is_true
from tunewright_api.v1alpha1.status import RunStatus

_POD_PROBLEMS = (Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CONFIG_ERROR, Reason.FORBIDDEN)


@dataclass(frozen=True, slots=True)
class TransitionEvent:
    """An event to post."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    action: str


def transition_events(old: RunStatus, new: RunStatus) -> list[TransitionEvent]:
    """Return the events of a pass. A start is no event: the pod has its own, and every request counts."""
    events = []
    if new.job_ref is not None and new.job_ref != old.job_ref:
        text = f"created Job {new.job_ref.name} (attempt {new.attempt})"
        events.append(TransitionEvent("Normal", Reason.JOB_CREATED, text, "Create"))
    if _became(old, new, ConditionType.COMPLETE):
        condition = _condition(new, ConditionType.COMPLETE)
        events.append(TransitionEvent("Normal", condition.reason, condition.message, "Complete"))
    elif _became(old, new, ConditionType.FAILED):
        condition = _condition(new, ConditionType.FAILED)
        events.append(TransitionEvent("Warning", condition.reason, condition.message, "Fail"))
    elif (new.restarts, new.free_restarts) != (old.restarts, old.free_restarts):
        last = new.attempts[-1]
        text = f"attempt {last.number} ended: {last.message}; the next one starts at {new.next_attempt_time}"
        events.append(TransitionEvent("Warning", last.cause, text, "Restart"))
    elif _pod_problem(new) is not None and _pod_problem(new) != _pod_problem(old):
        condition = _condition(new, ConditionType.PODS_READY)
        events.append(TransitionEvent("Warning", condition.reason, condition.message, "Start"))
    suspended = is_true(new.conditions, ConditionType.SUSPENDED)
    if suspended != is_true(old.conditions, ConditionType.SUSPENDED):
        if suspended:
            events.append(TransitionEvent("Normal", Reason.USER_SUSPENDED, "suspended by spec.suspend", "Suspend"))
        else:
            events.append(TransitionEvent("Normal", Reason.RESUMED, "resumed by spec.suspend", "Resume"))
    return events


def _became(old: RunStatus, new: RunStatus, kind: ConditionType) -> bool:
    return is_true(new.conditions, kind) and not is_true(old.conditions, kind)


def _condition(status: RunStatus, kind: ConditionType) -> Condition:
    condition = find_condition(status.conditions, kind)
    assert condition is not None, "all conditions are there from the first visit on"
    return condition


def _pod_problem(status: RunStatus) -> str | None:
    condition = find_condition(status.conditions, ConditionType.PODS_READY)
    return condition.reason if condition is not None and condition.reason in _POD_PROBLEMS else None
