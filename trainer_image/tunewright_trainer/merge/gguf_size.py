"""How large GGUF files will be, from the headers of the safetensors files: a full disk is told before hours of work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright_trainer.errors import InvalidModel
from tunewright_trainer.model_files import read_header

BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K_M": 5.75, "Q4_K_M": 4.95}
"""Bits per weight of the file types that are written, where the shapes suit them. The mixed ones (_M) spend more on
some layers; this is their average."""
UNQUANTIZED = ("F32", "F16", "BF16")
BLOCK, SMALL_BLOCK = 256, 32
"""Rows are quantized in blocks of so many weights; llama.cpp takes the small blocks where a row has no whole number of
large ones, and F16 where it has no whole number of small ones."""
SMALL_BLOCK_BITS = 8.5
"""The most that a small block needs per weight."""
VOCABULARY_BITS = 6.5625
"""llama.cpp keeps embedding and output layer at this at least."""
_VOCABULARY_LAYERS = ("embed", "lm_head", "wte")


@dataclass(frozen=True)
class Weight:
    """One tensor of the model."""

    name: str
    dtype: str
    """As in safetensors: F32, F16, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is quantized: vectors stay in float32."""
        return len(self.shape) > 1


def read_weights(uri: str, folder: Path) -> list[Weight]:
    """Return all tensors of a model folder.

    Raises:
        InvalidModel: A file is damaged, or there is none.
    """
    headers = [read_header(uri, path) for path in sorted(folder.glob("*.safetensors"))]
    weights = [Weight(n, e["dtype"], tuple(e["shape"])) for header in headers for n, e in header.items()]
    if not weights:
        raise InvalidModel(f"{uri}: no safetensors files: export.gguf needs a whole model")
    return weights


def base_type(weights: Iterable[Weight]) -> str:
    """Return the GGUF type that holds all weights without loss: theirs, or F32 where they are of several."""
    dtypes = {weight.dtype for weight in weights if weight.is_matrix}
    only = dtypes.pop() if len(dtypes) == 1 else "F32"
    return only if only in UNQUANTIZED else "F32"


def file_bytes(weights: Sequence[Weight], file_type: str) -> int:
    """Estimate the size of the tensors in a file, rather too much than too little."""
    return math.ceil(sum(weight.elements * _bits(weight, file_type) for weight in weights) / 8)


def _bits(weight: Weight, file_type: str) -> float:
    if not weight.is_matrix:
        return BITS["F32"]
    row = weight.shape[-1]
    if file_type in UNQUANTIZED:
        return BITS[file_type]
    if row % SMALL_BLOCK:
        return BITS["F16"]
    if file_type == "Q8_0" or row % BLOCK:
        return SMALL_BLOCK_BITS
    if any(part in weight.name for part in _VOCABULARY_LAYERS):
        return max(VOCABULARY_BITS, BITS[file_type])
    return BITS[file_type]
