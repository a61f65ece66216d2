"""Base and adapter to a merged model, tensor by tensor, large ones by blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from threadpoolctl import threadpool_limits

from tunewright_trainer.merge.adapter import Adapter
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.compute import Outcome, requests_of, write_tensor
from tunewright_trainer.merge.edits import Scale
from tunewright_trainer.merge.numbers import OUTPUT_DTYPES
from tunewright_trainer.merge.plan import Plan, plan_merge
from tunewright_trainer.merge.prefetch import Prefetcher
from tunewright_trainer.merge.shards import Shard, index_of, plan_shards
from tunewright_trainer.merge.side_files import side_files
from tunewright_trainer.merge.sinks import FileWriter, Sink, WrittenFile
from tunewright_trainer.transfer import Advance, Stop, ignore

OutputDtype = Literal["Auto", "BFloat16", "Float16", "Float32"]
DEFAULT_SHARD_BYTES = 5_000_000_000


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

    dropped_tensors: tuple[str, ...]
    """Tensors of the base that a model for the adapter's task does not have."""
    untied: bool
    """Input embedding and output head were one tensor in the base and are two now."""

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
    target = None if dtype == "Auto" else OUTPUT_DTYPES[dtype]
    plan = plan_merge(base, adapter, dequantized)
    shards = plan_shards(plan.tensors, target, max_shard_bytes)
    files = side_files(base, adapter, plan, target, outputs)
    index = index_of(shards)
    small = [*files.items(), *([index] if index is not None else [])]
    # The products are narrow: threads would wait for each other, and for the other processes of the machine, most of
    # the time.
    with threadpool_limits(1, "blas"):
        outcomes, written = _write_shards(shards, sink, advance, stop or Stop())
    written += [_write_small(sink, name, data) for name, data in small]
    return _findings(plan, shards, adapter, outcomes, written)


def _write_shards(
    shards: Sequence[Shard], sink: Sink, advance: Advance, stop: Stop
) -> tuple[dict[str, Outcome], list[WrittenFile]]:
    outcomes: dict[str, Outcome] = {}
    finishing: list[Future[WrittenFile]] = []
    requests = chain.from_iterable(requests_of(tensor) for shard in shards for tensor, _ in shard.tensors)
    # The last parts of a file are on their way while the next file is computed.
    with Prefetcher(requests) as pieces, ThreadPoolExecutor(1, "finish-shard") as finisher:
        for shard in shards:
            if finishing:
                finishing[-1].result()
            writer = sink.open(shard.name, shard.size_bytes)

            def write(data: bytes | memoryview, writer: FileWriter = writer) -> None:
                stop.check()
                writer.write(data)
                advance(len(data))

            try:
                write(shard.header)
                for tensor, dtype in shard.tensors:
                    outcomes[tensor.name] = write_tensor(tensor, dtype, pieces.take, write)
            # An interrupt too: an upload that was begun must not stay.
            except BaseException:
                writer.abort()
                raise
            finishing.append(finisher.submit(writer.finish))
        return outcomes, [job.result() for job in finishing]


def _write_small(sink: Sink, name: str, data: bytes) -> WrittenFile:
    writer = sink.open(name, len(data))
    try:
        writer.write(data)
    # As above.
    except BaseException:
        writer.abort()
        raise
    return writer.finish()


def _findings(
    plan: Plan, shards: Sequence[Shard], adapter: Adapter, outcomes: dict[str, Outcome], written: list[WrittenFile]
) -> MergeFindings:
    changes: list[TensorChange] = []
    copied = converted = 0
    for tensor, dtype in chain.from_iterable(shard.tensors for shard in shards):
        outcome = outcomes[tensor.name]
        if tensor.kind == "Copied":
            same = tensor.source.is_plain and tensor.source.dtype == dtype
            copied, converted = copied + same, converted + (not same)
        elif tensor.kind == "Delta" and not outcome.base_squares and all(isinstance(e, Scale) for e in tensor.edits):
            copied += 1  # 0 times anything is 0: a bias that the base has and never used
        elif tensor.kind == "Delta" or tensor.base is not None:
            kind: Literal["Delta", "Replaced"] = "Delta" if tensor.kind == "Delta" else "Replaced"
            changes.append(TensorChange(tensor.name, outcome.relative_delta, outcome.changed, kind))
        else:
            kind_of_new: Literal["Replaced", "Added"] = "Added" if tensor.kind == "Added" else "Replaced"
            changes.append(TensorChange(tensor.name, math.inf, changed=True, kind=kind_of_new))
    return MergeFindings(
        files=tuple(written),
        changes=tuple(changes),
        adapter_tensors=len(adapter.tensors),
        copied_tensors=copied,
        converted_tensors=converted,
        dropped_tensors=plan.dropped,
        untied=plan.config.get("tie_word_embeddings") is False,
    )
