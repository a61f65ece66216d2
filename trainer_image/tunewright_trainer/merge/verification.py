"""Proof that a merged model gives the logits of base and adapter: what is asked, what comes back, and the process that
does it (logits.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from tunewright_api.run_config import PVC_MOUNT_ROOT, StorageSettings
from tunewright_api.run_report import Finite
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.child import Step, run_child
from tunewright_trainer.merge.readers import FolderReader, Reader, StorageReader
from tunewright_trainer.run_log import RunLog
from tunewright_trainer.storage import Storage
from tunewright_trainer.transfer import Stop, StoredFile

_STEP = Step(
    "tunewright_trainer.merge.logits", "process that compares logits", "use a node with more memory: it needs that of "
    "the largest layer in float32 and about 2 GB"
)  # fmt: skip

_FRUGAL = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "2"}
"""Memory of a tensor goes back to the system when it is dropped: layers come and go, and would leave holes behind."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Location(_Document):
    """Where the files of a model are."""

    uri: str
    """In storage, or only a name for messages where there is a path."""
    path: Path | None = None
    """Folder on this machine. Default: the files are in storage."""
    files: Sequence[StoredFile] = ()
    """Those of the model in storage, as they were listed: other versions of them are an error."""


class LogitsTask(_Document):
    """What the process is told."""

    base: Location
    merged: Location
    adapter: Path
    """Folder of the adapter; with several adapters, of the one that they were combined to."""
    prompts: list[str] = Field(default_factory=list)
    """The user's own, besides the built-in ones."""
    max_divergence: float | None = None
    """Largest difference of a logit between the merged model and base with adapter. Default: what rounding to the
    number format of the merged files can explain."""
    dequantized: BaseQuantization | None = None
    """The weights that the adapter acts on are quantized this way, and back, before anything is computed with them: the
    merge did the same. Default: they are the base's own."""
    storage: StorageSettings = StorageSettings()
    local: bool = False
    """URIs in storage may be plain paths."""
    pvc_root: Path = Path(PVC_MOUNT_ROOT)


class LogitsOutcome(_Document):
    """What was found: all differences are of single logits, computed in float32."""

    max_divergence: Finite
    """Largest difference between the merged model and base with adapter."""
    allowed_divergence: Finite
    """What was allowed of it."""
    mean_kl: Finite
    """Mean over the positions of the KL divergence of the merged model's probabilities from those of base with adapter,
    in nats."""
    rounding: Finite
    """Largest difference that rounding the merged weights makes, by peft's own merge; 0 for float32."""
    deviation: Finite
    """Largest difference between the merged model and peft's own merge, rounded in the same way."""
    allowed_deviation: Finite
    effect: Finite
    """Largest difference that the adapter makes to the base."""
    prompts: int
    tokens: int
    """Given to each model."""
    architecture: str
    """Class of transformers that loads the merged files."""
    has_chat_template: bool
    notes: list[str] = Field(default_factory=list)
    """What a reader of the result should know."""
    seconds: Finite
    peak_memory_bytes: int


def open_location(location: Location, storage: Storage) -> Reader:
    """Return what reads the files of a model."""
    if location.path is not None:
        return FolderReader(location.path, location.uri)
    return StorageReader(storage, location.uri, location.files)


def run_logits_check(
    task: LogitsTask, folder: Path, environment: Mapping[str, str], log: RunLog, stop: Stop | None = None
) -> LogitsOutcome:
    """Prove that a merged model is base and adapter, in a process of its own.

    It needs memory for the largest layer in float32 and about 2 GB besides, whatever the size of the model, and reads
    the base three times and the merged files once.

    Args:
        task: Where everything is.
        folder: Work folder, for the files that the process is told by and answers with.
        environment: Of the process. Of the credentials it gets those of S3, where something is to be read from there.
        log: Takes what it prints.
        stop: Ends it when it is requested.

    Raises:
        WorkerFailure: With reason VerificationFailed, the message naming what is off; or InvalidAdapter, InvalidModel.
        Killed: It went over the memory limit.
        InternalError: It crashed.
        Preempted: A stop was requested.
    """
    in_storage = any(location.path is None for location in (task.base, task.merged))
    return run_child(
        _STEP,
        task,
        LogitsOutcome,
        folder,
        {**environment, **_FRUGAL},
        log,
        stop or Stop(),
        reads_storage=in_storage,
    )
