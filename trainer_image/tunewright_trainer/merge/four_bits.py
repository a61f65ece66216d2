"""The 4-bit formats of bitsandbytes in numpy: blocks of 64 numbers share a scale, the scales may be quantized again."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunewright_trainer.merge.numbers import Float32

Kind = Literal["NF4", "FP4"]
BLOCK = 64
"""Numbers that share a scale."""
SCALES_BLOCK = 256
"""Scales that share a scale, with double quantization."""
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)


@cache
def code_of(kind: Kind) -> Float32:
    """Return the 16 numbers that a format has, by bit pattern."""
    numbers: Float32 = np.array(_NF4 if kind == "NF4" else _FP4, np.float32)
    numbers /= np.abs(numbers).max()
    return numbers


@cache
def dynamic_code() -> Float32:
    """Return the 256 numbers that scales are quantized to: finer near 0."""
    numbers = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        ends = _evenly_spaced(np.float32(0.1), np.float32(1), 2**exponent + 1)
        means = (ends[:-1] + ends[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        numbers += [*scaled, *-scaled]
    return np.sort(np.array(numbers, np.float32))


def _evenly_spaced(first: np.float32, last: np.float32, count: int) -> Float32:
    """Return what torch.linspace does, to the last bit: it goes up from one end and down from the other."""
    step = np.float64(np.float32(last - first) / np.float32(count - 1))
    place = np.arange(count)
    up, down = np.float64(first) + step * place, np.float64(last) - step * (count - 1 - place)
    return np.where(place < count // 2, up, down).astype(np.float32)


def block_scales(values: Float32, block: int = BLOCK) -> Float32:
    """Return the largest magnitude of each block of a flat array; the last block may be short."""
    whole = len(values) // block * block
    scales: Float32 = np.abs(values[:whole]).reshape(-1, block).max(axis=1)
    if whole < len(values):
        scales = np.append(scales, np.abs(values[whole:]).max())
    return scales


def double_quantized(scales: Float32) -> Float32:
    """Return the scales of a whole tensor as they come back from double quantization."""
    offset = np.float32(scales.mean(dtype=np.float64))
    centred = scales - offset
    outer = block_scales(centred, SCALES_BLOCK)
    code = dynamic_code()
    chosen = np.searchsorted((code[:-1] + code[1:]) / np.float32(2), _scaled(centred, outer, SCALES_BLOCK))
    return dequantized(code[chosen], outer, SCALES_BLOCK) + offset


def quantized(values: Float32, scales: Float32, kind: Kind) -> Float32:
    """Return what a flat array of whole blocks is rounded to, as multiples of the scales of its blocks."""
    order, code = _order(kind), code_of(kind)
    scaled = _scaled(values, scales, BLOCK)
    table, bounds = _table(kind)
    chosen = table[scaled.view(np.uint32) >> 16]
    unclear = np.flatnonzero(chosen == _UNCLEAR)
    chosen[unclear] = np.searchsorted(bounds, scaled[unclear])
    result: Float32 = code[order][chosen]
    return result


def dequantized(multiples: Float32, scales: Float32, block: int = BLOCK) -> Float32:
    """Multiply each block with its scale; the last block may be short."""
    whole = len(multiples) // block * block
    result = np.empty_like(multiples)
    np.multiply(
        multiples[:whole].reshape(-1, block), scales[: whole // block, None], out=result[:whole].reshape(-1, block)
    )
    if whole < len(multiples):
        result[whole:] = multiples[whole:] * scales[-1]
    return result


def unpacked(packed: NDArray[np.uint8], code: Float32) -> Float32:
    """Return the numbers of packed pairs, the first of each in the upper four bits."""
    pairs = np.stack((code[np.arange(256) >> 4], code[np.arange(256) & 15]), axis=1)
    result: Float32 = pairs[packed].reshape(-1)
    return result


_UNCLEAR = 255


def _scaled(values: Float32, scales: Float32, block: int) -> Float32:
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / np.maximum(scales, np.float32(1e-38))
    return np.clip(dequantized(values, inverse, block), -1, 1)


@cache
def _order(kind: Kind) -> NDArray[np.intp]:
    return np.argsort(code_of(kind), kind="stable")


@cache
def _table(kind: Kind) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return the place of a number in the sorted code by the upper half of its bits, and the bounds between places.

    A look-up is ten times as fast as a search; the few halves that a bound cuts are searched.
    """
    sorted_code = code_of(kind)[_order(kind)]
    bounds = (sorted_code[:-1] + sorted_code[1:]) / np.float32(2)
    halves = np.arange(65536, dtype=np.uint32) << 16
    with np.errstate(invalid="ignore"):
        low = np.searchsorted(bounds, halves.view(np.float32))
        high = np.searchsorted(bounds, (halves | 0xFFFF).view(np.float32))
    return np.where(low == high, low, _UNCLEAR).astype(np.uint8), bounds
