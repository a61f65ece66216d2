"""Where the numbers of a merged tensor come from: stored as they are, or quantized by bitsandbytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from tunewright_trainer.errors import InvalidModel
from tunewright_trainer.merge import four_bits
from tunewright_trainer.merge.checkpoint import Checkpoint, Tensor, read_tensor
from tunewright_trainer.merge.numbers import ITEM_BYTES, Float32, from_bytes, from_float32, to_float32
from tunewright_trainer.merge.prefetch import Request
from tunewright_trainer.merge.readers import Reader

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_INT8_STEPS = 127


class Source(Protocol):
    """A tensor that can be read by ranges of its elements, in the order of its rows."""

    name: str
    dtype: str
    """Format of what comes out."""
    shape: tuple[int, ...]
    align: int
    """Ranges begin at multiples of this many elements."""
    is_plain: bool
    """The bytes of a piece are the elements in `dtype`, so that they can be copied."""

    def request(self, first: int, last: int) -> Request:
        """Return the piece of a file that has elements `first` up to `last`."""

    def decode(self, data: memoryview, first: int) -> Float32:
        """Return the elements of a piece that begins with element `first`, in memory of their own."""


class Stored:
    """A tensor of floats, or of anything that is only copied."""

    align = 1
    is_plain = True

    def __init__(self, reader: Reader, tensor: Tensor) -> None:
        self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape
        self._reader, self._tensor = reader, tensor

    def request(self, first: int, last: int) -> Request:
        """Return the piece of a file; see Source."""
        size = ITEM_BYTES[self.dtype]
        return Request(self._reader, self._tensor.file, self._tensor.start + first * size, (last - first) * size)

    def decode(self, data: memoryview, first: int) -> Float32:
        """Return the elements of a piece; see Source."""
        return to_float32(from_bytes(data, self.dtype), self.dtype)


class FourBits:
    """A tensor in NF4 or FP4 with its scales beside it."""

    is_plain = False

    def __init__(self, base: Checkpoint, tensor: Tensor, state: Mapping[str, Any]) -> None:
        self.name = tensor.name
        self.dtype = _DTYPES[state["dtype"]]
        self.shape = tuple(int(n) for n in state["shape"])
        self.align = int(state["blocksize"])
        if tensor.length != -(-math.prod(self.shape) // 2):
            raise InvalidModel(f"{base.reader.uri}: tensor {tensor.name} has not the size that its quant_state says")
        self._base, self._tensor, self._state = base, tensor, state
        self._tables: tuple[Float32, Float32] | None = None

    def request(self, first: int, last: int) -> Request:
        """Return the piece of a file; see Source."""
        start, end = first // 2, -(-last // 2)
        return Request(self._base.reader, self._tensor.file, self._tensor.start + start, end - start)

    def decode(self, data: memoryview, first: int) -> Float32:
        """Return the elements of a piece; see Source."""
        if self._tables is None:
            self._tables = self._base.read_float32(f"{self.name}.quant_map"), self._read_scales()
        code, scales = self._tables
        numbers = four_bits.unpacked(np.frombuffer(data, np.uint8), code)[: math.prod(self.shape) - first]
        # As bitsandbytes does: the product is rounded to the format that the model had before.
        product = four_bits.dequantized(numbers, scales[first // self.align :], self.align)
        rounded = from_float32(product, self.dtype)
        return to_float32(rounded, self.dtype)

    def _read_scales(self) -> Float32:
        scales = self._base.read(f"{self.name}.absmax")
        if "nested_blocksize" not in self._state:
            return to_float32(scales, "F32")
        code = self._base.read_float32(f"{self.name}.nested_quant_map")
        outer = self._base.read_float32(f"{self.name}.nested_absmax")
        offset = np.float32(self._state["nested_offset"])
        return four_bits.dequantized(code[scales], outer, int(self._state["nested_blocksize"])) + offset


class EightBits:
    """A matrix in int8 with a scale per row."""

    align = 1
    is_plain = False

    def __init__(self, base: Checkpoint, tensor: Tensor) -> None:
        self.name, self.shape = tensor.name, tensor.shape
        self.dtype = _DTYPES.get(str(base.config.get("dtype") or base.config.get("torch_dtype")), "F16")
        self._base, self._tensor = base, tensor
        self._scales: Float32 | None = None

    def request(self, first: int, last: int) -> Request:
        """Return the piece of a file; see Source."""
        return Request(self._base.reader, self._tensor.file, self._tensor.start + first, last - first)

    def decode(self, data: memoryview, first: int) -> Float32:
        """Return the elements of a piece; see Source."""
        if self._scales is None:
            self._scales = self._base.read_float32(f"{self.name.removesuffix('.weight')}.SCB").reshape(-1)
        steps = np.frombuffer(data, np.int8).astype(np.float32)
        columns = self.shape[-1]
        rows = np.arange(first, first + len(steps)) // columns
        rounded = from_float32(steps * (self._scales / np.float32(_INT8_STEPS))[rows], self.dtype)
        return to_float32(rounded, self.dtype)


def sources_of(base: Checkpoint) -> dict[str, Source]:
    """Return the tensors of a base model by name, quantized ones as what they stand for.

    Raises:
        InvalidModel: It is quantized in a way that is not read here.
    """
    quantization = base.config.get("quantization_config")
    if quantization is None:
        return {name: Stored(base.reader, tensor) for name, tensor in base.tensors.items()}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "bitsandbytes":
        raise InvalidModel(
            f"{base.reader.uri}: the weights are quantized by {method}, which nothing is merged into: give the model "
            "in 16 bits that they were made from as the base"
        )
    sources: dict[str, Source] = {}
    for name, tensor in base.tensors.items():
        if _is_side_tensor(base, name):
            continue
        state = next(
            (
                f"{name}.quant_state.bitsandbytes__{k}"
                for k in ("nf4", "fp4")
                if f"{name}.quant_state.bitsandbytes__{k}" in base.tensors
            ),
            None,
        )
        if state is not None:
            packed = read_tensor(base.reader, base.tensors[state]).tobytes()
            sources[name] = FourBits(base, tensor, _state(base, state, packed))
        elif f"{name.removesuffix('.weight')}.SCB" in base.tensors:
            sources[name] = EightBits(base, tensor)
        else:
            sources[name] = Stored(base.reader, tensor)
    return sources


def _state(base: Checkpoint, name: str, packed: bytes) -> dict[str, Any]:
    try:
        state = json.loads(packed)
        _DTYPES[state["dtype"]], int(state["blocksize"]), tuple(state["shape"])
    except (ValueError, TypeError, KeyError):
        raise InvalidModel(f"{base.reader.uri}: tensor {name} is no description of a quantized tensor") from None
    assert isinstance(state, dict)
    return state


def _is_side_tensor(base: Checkpoint, name: str) -> bool:
    """Tell whether a tensor only says how another one is quantized."""
    stem, _, last = name.rpartition(".")
    if last in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        return stem in base.tensors
    if last.startswith("bitsandbytes__"):
        return stem.removesuffix(".quant_state") in base.tensors
    return last in ("SCB", "weight_format") and f"{stem}.weight" in base.tensors
