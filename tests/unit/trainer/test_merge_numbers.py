"""Number formats in numpy: rounding, range, and the 4-bit formats' arithmetic."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from tunewright_trainer.merge.numbers import all_finite, fits, from_bytes, from_float32, squares, to_float32


def bits(pattern: int) -> np.float32:
    """Return the float32 of a bit pattern."""
    return np.float32(struct.unpack("<f", struct.pack("<I", pattern))[0])


def nearest_bfloat16(value: float) -> int:
    """Round to bfloat16 by exact arithmetic, ties to even; returns the 16 bits."""
    pattern: int = struct.unpack("<I", struct.pack("<f", value))[0]
    below = pattern >> 16
    low, high = (Fraction(float(bits(p << 16))) for p in (below, below + 1))
    exact = Fraction(value)
    if abs(exact - low) == abs(high - exact):
        return below + (below & 1)
    return below if abs(exact - low) < abs(high - exact) else below + 1


def test_bfloat16_is_rounded_to_nearest_and_to_even() -> None:
    """Every rounding is that of exact arithmetic, ties in both directions and subnormal numbers included."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 0x7F700000, 4000, dtype=np.uint32)
    ties = (generator.integers(0, 0x7F70, 2000, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([patterns, ties, patterns | 0x80000000]).astype(np.uint32).view(np.float32)
    expected = [nearest_bfloat16(float(value)) for value in values]
    assert from_float32(values, "BF16").tolist() == expected


def test_bfloat16_there_and_back_is_the_same() -> None:
    """A number that is a bfloat16 already comes back as it was, whatever its shape."""
    stored = np.arange(0x7F80, dtype=np.uint16).reshape(-1, 2, 8)
    assert np.array_equal(from_float32(to_float32(stored, "BF16"), "BF16"), stored)


def test_float16_is_rounded_once() -> None:
    """float16 takes numpy's rounding, to nearest and to even."""
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 0.1], np.float32)
    assert from_float32(values, "F16").tolist() == [1.0, 1 + 2**-9, float(np.float16(0.1))]


@pytest.mark.parametrize(
    ("dtype", "largest", "first"),
    [
        ("BF16", 0x7F7F7FFF, 0x7F7F8000),
        ("F16", 0x477FEFFF, 0x477FF000),
        ("F32", 0x7F7FFFFF, 0x7F800000),
    ],
)
def test_the_first_number_that_does_not_fit(dtype: str, largest: int, first: int) -> None:
    """The bound is where rounding gives infinity, on both sides of 0; NaN of any payload never fits."""
    for sign in (0, 0x80000000):
        assert fits(np.array([0, 1, bits(largest | sign)], np.float32), dtype)
        assert all_finite(from_float32(np.array([bits(largest | sign)], np.float32), dtype), dtype)
        for pattern in (first, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF):
            values = np.array([0, 1, 0], np.uint32)
            values[1] = pattern | sign
            assert not fits(values.view(np.float32), dtype), hex(pattern)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_stored_numbers_that_are_not_finite(dtype: str) -> None:
    """NaN and infinities are seen in every format, among negative numbers as well."""
    kind = {"BF16": np.float32, "F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    for bad in (math.nan, math.inf, -math.inf):
        values = np.array([-3, bad, 0, -1], kind)
        stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values
        assert not all_finite(stored, dtype)
        assert all_finite(stored[2:], dtype)
    assert all_finite(stored[:0], dtype)


def test_bytes_become_numbers_without_a_copy() -> None:
    """What is read is looked at where it lies; computing happens in memory of its own."""
    data = struct.pack("<4H", 0x3F80, 0x4000, 0xBF80, 0)
    stored = from_bytes(data, "BF16")
    assert not stored.flags.owndata
    values = to_float32(stored, "BF16")
    assert values.tolist() == [1.0, 2.0, -1.0, 0.0]
    assert values.flags.writeable
    assert squares(values.reshape(2, 2)) == 6.0
