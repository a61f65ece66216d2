"""What a decision consists of."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright_api.v1alpha1.status import RunStatus


@dataclass(frozen=True, slots=True)
class CreateJob:
    """Create the Job of an attempt; `halvings` as for `plan.build_job`."""

    attempt: int
    halvings: int


@dataclass(frozen=True, slots=True)
class DeleteJobs:
    """Delete Jobs, and with them their pods."""

    names: tuple[str, ...]
    services: tuple[str, ...] = ()
    """Services by which pods of theirs find each other."""


Action = CreateJob | DeleteJobs


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a pass."""

    status: RunStatus
    action: Action | None = None
    requeue_seconds: float | None = None
    """Look again after this time even when nothing happens."""
