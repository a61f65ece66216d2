"""Number formats of safetensors files in numpy: bfloat16 is kept as uint16, and everything is computed in float32."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[Any]
"""An array of float32; numpy's own types lose track of it in arithmetic with numbers."""

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the formats that numbers are computed from."""
ITEM_BYTES = {
    **FLOATS,
    **dict.fromkeys(("I64", "U64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
OUTPUT_DTYPES: dict[Literal["BFloat16", "Float16", "Float32"], str] = {
    "BFloat16": "BF16",
    "Float16": "F16",
    "Float32": "F32",
}
_NUMPY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
}
_OVERFLOW = {"BF16": 0x7F7F8000, "F16": 0x477FF000, "F32": 0x7F800000, "F64": 0x7F800000}
"""The first float32, by its bits, that is rounded to infinity; those of NaN and infinity itself are greater still."""
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
_SIGNED: dict[int, Any] = {2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def from_bytes(data: bytes | memoryview, dtype: str) -> NDArray[Any]:
    """Return the numbers of a safetensors format as a flat array over the data; bfloat16 as uint16."""
    return np.frombuffer(data, dtype=_NUMPY[dtype])


def to_float32(values: NDArray[Any], dtype: str) -> Float32:
    """Return numbers of a format (as `from_bytes` gives them) in float32, in memory of their own."""
    if dtype != "BF16":
        return values.astype(np.float32)
    wide: Float32 = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
    return wide


def from_float32(values: Float32, dtype: str) -> NDArray[Any]:
    """Round float32 to a format, to nearest and to even where two are as near; bfloat16 as uint16.

    The numbers must fit (see `fits`): what becomes of others is not said.
    """
    if dtype == "BF16":
        # Half of the last kept digit is added, one less where that digit is even, so that a tie goes to even.
        bits = values.view(np.uint32)
        rounded = np.right_shift(bits, 16)
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        return rounded.view(np.uint16)[..., 1::2].copy()
    return values if dtype == "F32" else values.astype(_NUMPY[dtype])


def fits(values: Float32, dtype: str) -> bool:
    """Tell whether float32 numbers are finite, and stay so when they are rounded to a format."""
    return _below(values, _OVERFLOW[dtype])


def all_finite(values: NDArray[Any], dtype: str) -> bool:
    """Tell whether numbers of a format (as `from_bytes` gives them) are neither NaN nor infinite."""
    return _below(values, _INFINITY[dtype])


def _below(values: NDArray[Any], bound: int) -> bool:
    """Compare magnitudes by their bits with those of a positive number: two passes at the speed of memory."""
    if not values.size:
        return True
    size = values.dtype.itemsize
    # Among signed integers every positive float is above the negative ones, among unsigned ones it is below.
    sign = 1 << (8 * size - 1)
    positive = int(values.view(_SIGNED[size]).max()) < bound
    return positive and int(values.view(_UNSIGNED[size]).max()) < bound + sign


def squares(values: Float32) -> float:
    """Return the sum of squares."""
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))
