"""What the status remembers of earlier passes, and how conditions are written. Pure."""

from __future__ import annotations

import datetime

from tunewright_api.conditions import (
    Condition,
    ConditionType,
    Reason,
    find_condition,
    is_true,
    set_condition,
)
from tunewright_api.v1alpha1.status import RunStatus
from tunewright_operator.observed import parse_time

MAX_MESSAGE = 2048
GPU_OUT_OF_MEMORY = "GpuOutOfMemory"

Mark = tuple[ConditionType, bool, str, str]
"""A condition to set: type, status, reason, message."""

_FIRST: tuple[Mark, ...] = (
    (ConditionType.ACCEPTED, False, Reason.PENDING, ""),
    (ConditionType.SUSPENDED, False, Reason.NOT_SUSPENDED, ""),
    (ConditionType.PODS_READY, False, Reason.PENDING, ""),
    (ConditionType.COMPLETE, False, Reason.IN_PROGRESS, ""),
    (ConditionType.FAILED, False, Reason.IN_PROGRESS, ""),
    (ConditionType.READY, False, Reason.IN_PROGRESS, ""),
    (ConditionType.STALLED, False, Reason.IN_PROGRESS, ""),
)


def timestamp(now: datetime.datetime) -> str:
    """Return a time as Kubernetes writes it."""
    return now.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_until(text: str, now: datetime.datetime) -> float:
    """Return the seconds from `now` to an RFC 3339 time; negative when it is over."""
    return (parse_time(text) - now).total_seconds()


def is_finished(status: RunStatus) -> bool:
    """Whether the run has ended for good."""
    return is_true(status.conditions, ConditionType.COMPLETE) or is_true(status.conditions, ConditionType.FAILED)


def current_attempt(status: RunStatus) -> int:
    """Return the number of the attempt that runs or comes next."""
    return status.attempts[-1].number + 1 if status.attempts else 1


def halvings(status: RunStatus) -> int:
    """Return how often an attempt ran out of GPU memory (within the attempts kept, which are more than enough)."""
    return sum(attempt.cause == GPU_OUT_OF_MEMORY for attempt in status.attempts)


def mark(status: RunStatus, now: datetime.datetime, *marks: Mark) -> RunStatus:
    """Return the status with conditions set, all of them present."""
    conditions = list(status.conditions)
    first = () if conditions else _FIRST
    for kind, value, reason, message in (*first, *marks):
        new = Condition(
            type=kind,
            status="True" if value else "False",
            reason=reason,
            message=message[:MAX_MESSAGE],
            last_transition_time=timestamp(now),
            observed_generation=status.observed_generation,
        )
        conditions = set_condition(conditions, new)
    return status.model_copy(update={"conditions": conditions})


def reason_of(status: RunStatus, kind: ConditionType) -> str | None:
    """Return the reason of a condition, None before the first visit."""
    condition = find_condition(status.conditions, kind)
    return condition.reason if condition else None
