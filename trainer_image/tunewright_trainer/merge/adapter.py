"""A saved adapter: its configuration and tensors, checked as far as that needs no base model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunewright_trainer.errors import InvalidAdapter, InvalidModel
from tunewright_trainer.merge.checkpoint import Tensor, read_object, read_tensor, read_tensors
from tunewright_trainer.merge.numbers import FLOATS, ITEM_BYTES, Float32, all_finite, from_bytes, to_float32
from tunewright_trainer.merge.readers import FolderReader, Reader
from tunewright_trainer.start_adapter import CONFIG, WEIGHTS

_PICKLE = "adapter_model.bin"
_PIECE_BYTES = 16 * 1024 * 1024
_MERGED = ("LORA", "IA3", "TRAINABLE_TOKENS")
_ADVICE = {
    "PREFIX_TUNING": "it adds keys and values to the input and changes no weight: use base and adapter together",
    "PROMPT_TUNING": "it adds to the input and changes no weight: use base and adapter together",
    "P_TUNING": "it adds to the input and changes no weight: use base and adapter together",
    "MULTITASK_PROMPT_TUNING": "it adds to the input and changes no weight: use base and adapter together",
    "ADAPTION_PROMPT": "it adds to the input of layers and changes no weight: use base and adapter together",
}
_VARIANTS = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA, which acts on some tokens only",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow, which chooses between adapters for every token",
    "kasa_config": "KaSA, which changes the base as well",
    "layer_replication": "layer replication, which makes a model with other layers",
    "megatron_config": "Megatron layers",
}
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal")
"""Ways to start an adapter that leave the base's weights alone; True and False do, too."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as peft saved it. Safe to use from several threads."""

    reader: Reader
    config: Mapping[str, Any]
    """Content of adapter_config.json."""
    tensors: Mapping[str, Tensor]
    """Tensors of adapter_model.safetensors by name."""

    @property
    def uri(self) -> str:
        """Its folder, for messages."""
        return self.reader.uri

    @property
    def kind(self) -> str:
        """Its peft type."""
        return str(self.config["peft_type"])

    def load(self, name: str) -> Float32:
        """Return a tensor as float32. The last few are kept: experts share theirs. Not to be changed."""
        return _load(self, name)

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return int(self._by_pattern("rank_pattern", module, self.config.get("r", 8)))

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's low-rank product."""
        rank = self.rank_of(module)
        alpha = float(self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _by_pattern(self, field: str, module: str, default: Any) -> Any:
        patterns = self.config.get(field) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def __hash__(self) -> int:
        return id(self)


@lru_cache(maxsize=4)
def _load(adapter: Adapter, name: str) -> Float32:
    tensor = adapter.tensors[name]
    return to_float32(read_tensor(adapter.reader, tensor), tensor.dtype)


def equal_tensors(adapter: Adapter, one: str, other: str) -> bool:
    """Tell whether two tensors of an adapter have the same bytes."""
    first, second = adapter.tensors[one], adapter.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    pieces = range(0, first.length, _PIECE_BYTES)
    return all(
        adapter.reader.read(first.file, first.start + n, min(_PIECE_BYTES, first.length - n))
        == adapter.reader.read(second.file, second.start + n, min(_PIECE_BYTES, first.length - n))
        for n in pieces
    )


def load_adapter(folder: Path, uri: str | None = None) -> Adapter:
    """Read a saved adapter and check what can be told without its base.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        uri: Its name in messages. Default: the path.

    Raises:
        InvalidAdapter: Damaged, empty, not finite, of rank 0, or of a kind that cannot be merged.
    """
    reader = FolderReader(folder, uri)
    if CONFIG not in reader.files:
        raise InvalidAdapter(f"{reader.uri}: no {CONFIG}: this is not the folder of an adapter")
    if WEIGHTS not in reader.files:
        pickle = f": {_PICKLE} is a pickle, which is never loaded" if _PICKLE in reader.files else ""
        raise InvalidAdapter(f"{reader.uri}: no {WEIGHTS}{pickle}")
    try:
        config = read_object(reader, CONFIG)
        tensors = read_tensors(reader, WEIGHTS)
    except InvalidModel as error:
        raise InvalidAdapter(str(error)) from None
    adapter = Adapter(reader, config, tensors)
    check_kind(adapter)
    _check_tensors(adapter)
    return adapter


def check_kind(adapter: Adapter) -> None:
    """Refuse what cannot be merged, by name.

    Raises:
        InvalidAdapter: What it is, and what to do.
    """
    config, place = adapter.config, f"{adapter.uri}/{CONFIG}"
    kind = config.get("peft_type")
    if kind not in _MERGED:
        advice = _ADVICE.get(str(kind), "merge it with peft itself, or train a LoRA adapter")
        raise InvalidAdapter(f"{place}: an adapter of type {kind!r} cannot be merged here: {advice}")
    if kind != "LORA":
        return
    for field, name in _VARIANTS.items():
        if config.get(field):
            raise InvalidAdapter(f"{place}: {field} is set: {name} cannot be merged here: merge it with peft itself")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _HARMLESS_INITS:
        raise InvalidAdapter(
            f"{place}: init_lora_weights is {start!r}: such an adapter belongs to a base whose weights were changed "
            "when it was made. Convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    ranks = {"r": config.get("r", 8), **{f"rank_pattern {k}": v for k, v in (config.get("rank_pattern") or {}).items()}}
    for field, rank in ranks.items():
        if not isinstance(rank, int) or rank <= 0:
            raise InvalidAdapter(f"{place}: {field} is {rank!r}: a rank is a whole number above 0")


def _check_tensors(adapter: Adapter) -> None:
    if not adapter.tensors:
        raise InvalidAdapter(f"{adapter.uri}/{WEIGHTS}: it has no tensors: nothing was trained")
    for tensor in adapter.tensors.values():
        if tensor.dtype not in FLOATS:
            raise InvalidAdapter(f"{adapter.uri}: tensor {tensor.name} is {tensor.dtype}: an adapter's are floats")
        if 0 in tensor.shape:
            raise InvalidAdapter(
                f"{adapter.uri}: tensor {tensor.name} is empty (shape {list(tensor.shape)}): rank 0, or saved without "
                "gathering its parts (DeepSpeed ZeRO-3, FSDP)"
            )
        step = _PIECE_BYTES // ITEM_BYTES[tensor.dtype] * ITEM_BYTES[tensor.dtype]
        for start in range(0, tensor.length, step):
            data = adapter.reader.read(tensor.file, tensor.start + start, min(step, tensor.length - start))
            if not all_finite(from_bytes(data, tensor.dtype), tensor.dtype):
                raise InvalidAdapter(
                    f"{adapter.uri}: tensor {tensor.name} has numbers that are NaN or infinite: its training diverged; "
                    "train it again with a lower learning rate"
                )
