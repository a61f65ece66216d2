"""The weight files of a merged model, planned before any of them is written: names, headers, index."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tunewright_trainer.merge.numbers import FLOATS, ITEM_BYTES
from tunewright_trainer.merge.plan import MergedTensor, size_of
from tunewright_trainer.model_files import WEIGHTS, WEIGHTS_INDEX

_ALIGNMENT = 8


@dataclass(frozen=True)
class Shard:
    """One weight file."""

    name: str
    tensors: tuple[tuple[MergedTensor, str], ...]
    """With their number formats, in the order of their bytes."""
    header: bytes
    """What stands before the tensors."""
    size_bytes: int


def plan_shards(tensors: Sequence[MergedTensor], dtype: str | None, max_bytes: int) -> list[Shard]:
    """Spread tensors over files in their order.

    Args:
        tensors: All of them.
        dtype: Number format of all floats, as safetensors writes it; None: every tensor keeps its own.
        max_bytes: Largest sum of tensors in a file; a larger tensor has a file of its own.
    """
    groups: list[list[tuple[MergedTensor, str]]] = [[]]
    filled = 0
    for tensor in tensors:
        own = dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        size = size_of(tensor, own)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, own))
        filled += size
    if len(groups) == 1:
        return [_shard(WEIGHTS, groups[0])]
    return [_shard(f"model-{n:05}-of-{len(groups):05}.safetensors", group) for n, group in enumerate(groups, 1)]


def index_of(shards: Sequence[Shard]) -> tuple[str, bytes] | None:
    """Return name and content of the index, None where one file has everything."""
    if len(shards) == 1:
        return None
    total = sum(shard.size_bytes - len(shard.header) for shard in shards)
    places = {tensor.name: shard.name for shard in shards for tensor, _ in shard.tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return WEIGHTS_INDEX, (json.dumps(document, indent=2) + "\n").encode()


def _shard(name: str, tensors: list[tuple[MergedTensor, str]]) -> Shard:
    # Wide numbers first, so that all of them lie at multiples of their size; the order is the base's otherwise.
    ordered = sorted(tensors, key=lambda item: -ITEM_BYTES[item[1]])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, dtype in ordered:
        start, end = end, end + size_of(tensor, dtype)
        entries[tensor.name] = {"dtype": dtype, "shape": list(tensor.source.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return Shard(name, tuple(ordered), struct.pack("<Q", len(header)) + header, 8 + len(header) + end)
