"""Exit codes of the trainer and the fate each one carries."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Fate(enum.Enum):
    """What the operator does after an attempt ended with a code."""

    SUCCEEDED = "Succeeded"
    FATAL = "Fatal"
    """The same input would fail again: the workload fails at once."""
    COUNTED_RETRY = "CountedRetry"
    """A new attempt that counts towards `retry.maxRestarts`."""
    FREE_RETRY = "FreeRetry"
    """A new attempt that does not count: the platform took the pod, the run did nothing wrong."""


class ExitCode(enum.IntEnum):
    """How a trainer process ended. The only definition; the Job's podFailurePolicy is rendered from it."""

    SUCCESS = 0
    """Trained or merged, and published, or the result was there already."""
    INTERNAL_ERROR = 1
    """A fault of the trainer or of a library; the log has the traceback."""
    INVALID_INPUT = 20
    """The data, the model or the configuration cannot work."""
    ACCESS_DENIED = 21
    """Storage or a hub refused the credentials."""
    GPU_OUT_OF_MEMORY = 22
    """Model, adapter and one micro-batch do not fit the GPU; the next attempt halves `batchSize`."""
    UNAVAILABLE = 23
    """Storage or network did not answer, all retries included."""
    DIVERGED = 24
    """The loss became NaN or infinite."""
    PREEMPTED = 25
    """The pod was asked to stop and did so in order."""
    STALLED = 26
    """No progress for longer than `retry.timeouts.stall`."""
    KILLED = 137
    """SIGKILL: most often the container went over its memory limit."""


class Outcome(NamedTuple):
    """The fixed consequence of an exit code."""

    fate: Fate
    reason: str
    """CamelCase reason for conditions, events and `status.failure`."""


OUTCOMES: dict[ExitCode, Outcome] = {
    ExitCode.SUCCESS: Outcome(Fate.SUCCEEDED, "Succeeded"),
    ExitCode.INTERNAL_ERROR: Outcome(Fate.COUNTED_RETRY, "InternalError"),
    ExitCode.INVALID_INPUT: Outcome(Fate.FATAL, "InvalidInput"),
    ExitCode.ACCESS_DENIED: Outcome(Fate.FATAL, "AccessDenied"),
    ExitCode.GPU_OUT_OF_MEMORY: Outcome(Fate.COUNTED_RETRY, "GpuOutOfMemory"),
    ExitCode.UNAVAILABLE: Outcome(Fate.COUNTED_RETRY, "StorageUnavailable"),
    ExitCode.DIVERGED: Outcome(Fate.FATAL, "Diverged"),
    ExitCode.PREEMPTED: Outcome(Fate.FREE_RETRY, "Preempted"),
    ExitCode.STALLED: Outcome(Fate.COUNTED_RETRY, "Stalled"),
    ExitCode.KILLED: Outcome(Fate.COUNTED_RETRY, "Killed"),
}


def outcome_of(code: int) -> Outcome:
    """Return the consequence of a container's exit code; a code of nobody's counts as an internal error."""
    try:
        return OUTCOMES[ExitCode(code)]
    except ValueError:
        return OUTCOMES[ExitCode.INTERNAL_ERROR]
