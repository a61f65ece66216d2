"""What the pods of an attempt wait for, and how many of them are ready. Pure."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import NamedTuple

from tunewright_api.conditions import Reason
from tunewright_operator.observed import ObservedJob, ObservedPod
from tunewright_operator.settings import Settings
from tunewright_operator.status.memory import seconds_until


class Problem(NamedTuple):
    """What keeps a pod from running."""

    reason: str
    message: str
    final_in: float | None = None
    """Seconds until it ends the run; None: it never does."""


def problem(pods: Sequence[ObservedPod], settings: Settings, now: datetime.datetime) -> Problem:
    """Return what keeps pods from running: of several problems, the one that ends the run first."""
    found = []
    for pod in pods:
        own = _problem_of(pod, settings, now)
        if own is not None:
            # The scheduler's words do not say which pod they are about.
            named = own.message if len(pods) == 1 or pod.name in own.message else f"pod {pod.name}: {own.message}"
            found.append(own._replace(message=named))
    return min(found, key=_urgency, default=Problem(Reason.WAITING_FOR_PODS, ""))


def _urgency(found: Problem) -> float:
    return math.inf if found.final_in is None else found.final_in


def _problem_of(pod: ObservedPod, settings: Settings, now: datetime.datetime) -> Problem | None:
    if pod.unschedulable is not None:
        return Problem(Reason.UNSCHEDULABLE, pod.unschedulable)
    detail = f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
    waited = -seconds_until(pod.scheduled_at or pod.created, now)
    if pod.image_problem:
        return Problem(Reason.IMAGE_PULL_FAILED, detail, settings.image_pull_grace_seconds - waited)
    if pod.config_problem:
        reason = Reason.IMAGE_PULL_FAILED if pod.waiting_reason == "InvalidImageName" else Reason.CONFIG_ERROR
        return Problem(reason, detail, settings.config_error_grace_seconds - waited)
    return None


def with_count(job: ObservedJob, pods: Sequence[ObservedPod], message: str = "") -> str:
    """Return a message about the pods of a Job, led by how many of them are ready where there are several."""
    if job.completions == 1:
        return message
    count = f"{sum(pod.ready for pod in pods)}/{job.completions} pods ready"
    return f"{count}; {message}" if message else count
