"""Everything that can end a run early. Each class fixes the exit code (and so the fate) and the reason.

TrainerError
├── InvalidInput            20  the same input fails again: never retried
│   ├── InvalidData             rows, or a file of rows
│   ├── InvalidModel            the base model's files
│   ├── InvalidAdapter          the adapter to go on from, or to merge
│   ├── MergeRejected           a merged model did not pass a check
│   ├── InvalidConfiguration    the run document, alone or against the hardware
│   ├── RewardFunctionFailed    a reward function of the user's own
│   ├── MissingBucket
│   ├── MissingFile
│   ├── MissingModel            a hub repository or a revision of it
│   └── EndpointUnreachable     no S3 service at storage.endpoint, seen at first contact
├── AccessDenied            21  storage or hub refused the credentials
├── GpuOutOfMemory          22
├── StorageUnavailable      23  an outage outlasted all retries
│   └── HubUnavailable
├── Diverged                24
├── Preempted               25
├── Stalled                 26
├── Killed                 137  the worker process was killed from outside
├── WorkerFailure            *  what the worker reported: it names its own code and reason
├── PeerLost                 1  another process of the run ended: the pod where that happened says why
└── InternalError            1  our fault
    ├── VerificationFailed      the saved files do not give the logits of the trained model
    ├── CorruptArtifact         a published result does not match its manifest
    └── InputsChanged           the pods of a run found different inputs
"""

from __future__ import annotations

from typing import ClassVar

from tunewright_api.exit_codes import ExitCode


class TrainerError(Exception):
    """Ends the run. The message says what was wrong, where, and what to do; it never holds a secret."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL_ERROR
    reason: ClassVar[str] = "InternalError"


class InvalidInput(TrainerError):
    """The data, the model or the configuration cannot work."""

    exit_code = ExitCode.INVALID_INPUT
    reason = "InvalidInput"


class InvalidData(InvalidInput):
    """A data file or rows of it are unusable; the message names file, line and field."""

    reason = "InvalidData"


class InvalidModel(InvalidInput):
    """The base model's files are incomplete, damaged or of a kind that is not loaded."""

    reason = "InvalidModel"


class InvalidAdapter(InvalidInput):
    """An adapter to go on from or to merge is damaged, no adapter, or not one of this model and method."""

    reason = "InvalidAdapter"


class MergeRejected(InvalidInput):
    """A merged model is not base and adapter. The same merge would give the same files, so that it is never retried."""

    reason = "VerificationFailed"


class InvalidConfiguration(InvalidInput):
    """The run document cannot be carried out, alone or on this hardware."""

    reason = "InvalidConfiguration"


class RewardFunctionFailed(InvalidInput):
    """A reward function of the user's own raised, crashed, took too long or gave something else than scores."""

    reason = "RewardFunctionFailed"


class MissingBucket(InvalidInput):
    """A bucket does not exist."""

    reason = "MissingBucket"


class MissingFile(InvalidInput):
    """An object, a file or everything below a prefix does not exist."""

    reason = "MissingFile"


class MissingModel(InvalidInput):
    """A hub repository, or the revision asked for, does not exist."""

    reason = "MissingModel"


class EndpointUnreachable(InvalidInput):
    """There is no S3 service at the endpoint: seen at first contact, so most likely a wrong address."""

    reason = "EndpointUnreachable"


class DiskFull(InvalidInput):
    """The work folder is too small for model, data and result."""

    reason = "DiskFull"


class AccessDenied(TrainerError):
    """Storage or a hub refused the credentials."""

    exit_code = ExitCode.ACCESS_DENIED
    reason = "AccessDenied"


class GpuOutOfMemory(TrainerError):
    """The GPU's memory does not hold model, adapter and one micro-batch."""

    exit_code = ExitCode.GPU_OUT_OF_MEMORY
    reason = "GpuOutOfMemory"


class StorageUnavailable(TrainerError):
    """Storage or network did not answer, all retries included."""

    exit_code = ExitCode.UNAVAILABLE
    reason = "StorageUnavailable"


class HubUnavailable(StorageUnavailable):
    """The hub did not answer, all retries included."""

    reason = "HubUnavailable"


class Diverged(TrainerError):
    """The loss became NaN or infinite."""

    exit_code = ExitCode.DIVERGED
    reason = "Diverged"


class Preempted(TrainerError):
    """The pod was asked to stop."""

    exit_code = ExitCode.PREEMPTED
    reason = "Preempted"


class Stalled(TrainerError):
    """No training step for longer than `retry.timeouts.stall`."""

    exit_code = ExitCode.STALLED
    reason = "Stalled"


class Killed(TrainerError):
    """The worker process was killed from outside, most often for going over the container's memory limit."""

    exit_code = ExitCode.KILLED
    reason = "Killed"


class WorkerFailure(TrainerError):
    """The worker gave up and said why; code and reason are the worker's own."""

    def __init__(self, exit_code: ExitCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.worker_exit_code = exit_code
        self.worker_reason = reason


class PeerLost(TrainerError):
    """The other processes of the run cannot be reached, or not any more: seldom a cause of its own."""

    reason = "PeerLost"


class InternalError(TrainerError):
    """Our fault."""


class VerificationFailed(InternalError):
    """The saved files do not give the logits of the trained model."""

    reason = "VerificationFailed"


class CorruptArtifact(InternalError):
    """A published result does not match its manifest."""

    reason = "CorruptArtifact"


class InputsChanged(InternalError):
    """Model or data were changed while the pods of a run started."""

    reason = "InputsChanged"


def fate_of(error: TrainerError) -> tuple[ExitCode, str]:
    """Return the exit code and the reason that a run ended by `error` reports."""
    if isinstance(error, WorkerFailure):
        return error.worker_exit_code, error.worker_reason
    return error.exit_code, error.reason
