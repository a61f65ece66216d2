"""Number formats of safetensors files in numpy: bfloat16 is kept as uint16, and everything is computed in float32."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

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
_SIGN_OFF = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF, "F64": 0x7FFFFFFFFFFFFFFF}
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def from_bytes(data: bytes | memoryview, dtype: str) -> NDArray[Any]:
    """Return the numbers of a safetensors format as a flat array over the data; bfloat16 as uint16."""
    return np.frombuffer(data, dtype=_NUMPY[dtype])


def to_float32(values: NDArray[Any], dtype: str) -> Float32:
    """Return numbers of a format (as `from_bytes` gives them) in float32, in memory of their own."""
    if dtype == "BF16":
        return np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32)


def from_float32(values: Float32, dtype: str) -> NDArray[Any]:
    """Round float32 to a format, to nearest and to even where two are as near; bfloat16 as uint16.

    Numbers beyond the format's range become infinite, NaN stays NaN.
    """
    if dtype == "BF16":
        return _to_bfloat16(values)
    if dtype == "F32":
        return values
    with np.errstate(over="ignore"):
        return values.astype(_NUMPY[dtype])


def _to_bfloat16(values: Float32) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    # Half of the last kept digit is added, one less where that digit is even, so that a tie goes to even.
    rounded = np.right_shift(bits, 16)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    # The sum of squares is NaN when one of them is: one pass at the speed of memory.
    if np.isnan(np.dot(values.reshape(-1), values.reshape(-1))):
        result[np.isnan(values)] = 0x7FC0
    return result


def all_finite(values: NDArray[Any], dtype: str) -> bool:
    """Tell whether numbers of a format (as `from_bytes` gives them) are neither NaN nor infinite."""
    bits = values.view(_UNSIGNED[FLOATS[dtype]])
    return not bits.size or int(np.bitwise_and(bits, _SIGN_OFF[dtype]).max()) < _INFINITY[dtype]


def squares(values: Float32) -> float:
    """Return the sum of squares."""
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))
