"""Base and adapter to a merged model, tensor by tensor, large ones by blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunewright_trainer.merge.adapter import Adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.sinks import Sink, WrittenFile
from tunewright_trainer.transfer import Advance, Stop, ignore

OutputDtype = Literal["Auto", "BFloat16", "Float16", "Float32"]
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class BaseQuantization:
    """How the base was quantized when the adapter was trained, for merging into what the adapter saw."""

    bits: Literal[4, 8] = 4
    type: Literal["NF4", "FP4"] = "NF4"
    double_quant: bool = True


@dataclass(frozen=True)
class TensorChange:
    """What happened to a tensor that the adapter names."""

    name: str
    """In the merged model."""
    relative_delta: float
    """Frobenius norm of the change, before rounding, over that of the base's tensor; infinite where that is 0 or where
    the base has no such tensor."""
    changed: bool
    """At least one element differs from the base's after rounding."""
    kind: Literal["Delta", "Replaced", "Added"]
    """A delta was added, the adapter has the whole tensor, or the base has no such tensor."""


@dataclass(frozen=True)
class MergeFindings:
    """What a merge did, for verification and the manifest."""

    files: tuple[WrittenFile, ...]
    """All of them, in the order in which they were finished."""
    changes: tuple[TensorChange, ...]
    """One per tensor that the adapter names, in the order of the files."""
    adapter_tensors: int
    """Tensors of the adapter; each was used exactly once."""
    copied_tensors: int
    """Tensors that went through byte for byte."""
    converted_tensors: int
    """Tensors that only got another number format."""

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Tensors that the adapter names and that are nevertheless equal to the base's."""
        return tuple(change.name for change in self.changes if not change.changed)


def merge(
    base: Checkpoint,
    adapter: Adapter,
    sink: Sink,
    *,
    dtype: OutputDtype = "Auto",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dequantized: BaseQuantization | None = None,
    outputs: Sequence[str] | None = None,
    advance: Advance = ignore,
    stop: Stop | None = None,
) -> MergeFindings:
    """Write base + adapter as a model folder: weights, index, configuration, tokenizer.

    Args:
        base: The base model.
        adapter: The adapter.
        sink: Where to. After an error what was finished is still there: the caller deletes the folder.
        dtype: Number format of all floats. Auto: every tensor keeps the base's.
        max_shard_bytes: Largest weight file; a larger tensor has a file of its own.
        dequantized: Quantize the tensors that the adapter targets this way and add the delta to what comes back, as
            the adapter saw the base in training. Default: the delta is added to the base's own numbers.
        outputs: Names of the outputs of a classification head, for the configuration.
        advance: Told the bytes of weights written.
        stop: Ends the merge when it is requested.

    Raises:
        InvalidAdapter: The adapter is not one of this base, or needs what merging does not support.
        InvalidModel: The base is damaged.
        VerificationFailed: A number of the result is not finite.
        TrainerError, OSError: Reading or writing failed.
    """
    raise NotImplementedError
