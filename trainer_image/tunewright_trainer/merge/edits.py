"""What an adapter does to the numbers of a tensor.

A tensor is a matrix here, of R rows and C columns: all but its last dimension are rows, except for convolutions, whose
first dimension alone is. `first` is the number of the first row of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tunewright_trainer.merge import four_bits
from tunewright_trainer.merge.adapter import Adapter
from tunewright_trainer.merge.numbers import Float32, from_float32, to_float32


class Edit(Protocol):
    """A step from the base's numbers to the merged ones."""

    align: int
    """Blocks begin at multiples of this many elements."""
    scans: bool
    """Wants to see the whole tensor before it can change any of it."""

    def begin(self) -> None:
        """Make ready for a tensor: read what is needed of the adapter."""

    def scan(self, block: Float32, first: int) -> None:
        """Look at some rows, in their order, before any is changed."""

    def apply(self, block: Float32, first: int) -> Float32:
        """Return the new numbers of some rows; the block itself is not changed."""

    def end(self) -> None:
        """Forget what was read."""


class _Simple:
    """Defaults of the edits that look at nothing beforehand."""

    align = 1
    scans = False

    def begin(self) -> None:
        """Nothing to read."""

    def scan(self, block: Float32, first: int) -> None:
        """Nothing to look at."""

    def end(self) -> None:
        """Nothing to forget."""


class LowRank(_Simple):
    """Adds scale * B @ A, or its transpose."""

    def __init__(self, adapter: Adapter, a: str, b: str, scale: float, *, transposed: bool) -> None:
        """Prepare.

        Args:
            adapter: Has the factors.
            a: Name of the factor of shape (rank, in, ...).
            b: Name of the factor of shape (out, rank, ...).
            scale: Of the product.
            transposed: The matrix has the inputs as its rows.
        """
        self.names = (a, b)
        self.scale = scale
        self._adapter, self._transposed = adapter, transposed

    def begin(self) -> None:
        """Read the factors."""
        a, b = (self._adapter.load(name) for name in self.names)
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        left, right = (a.T, b.T) if self._transposed else (b, a)
        self._left = np.ascontiguousarray(left) * np.float32(self.scale)
        self._right = np.ascontiguousarray(right)

    def apply(self, block: Float32, first: int) -> Float32:
        """Add the rows' part of the product."""
        result: Float32 = self._left[first : first + len(block)] @ self._right
        result += block
        return result

    def end(self) -> None:
        """Forget the factors."""
        del self._left, self._right


class ExpertLowRank(LowRank):
    """Adds the low-rank product of one expert, or of all one after the other, to rows of stacked experts.

    peft keeps the factors of E experts in one pair: A of shape (E * rank, in), expert by expert, and B of shape
    (out, rank * E), whose columns go through the experts first.
    """

    def __init__(
        self, adapter: Adapter, a: str, b: str, scale: float, *, transposed: bool, experts: int, part: Part
    ) -> None:
        """Prepare; `part` says which of the product's numbers the tensor has."""
        super().__init__(adapter, a, b, scale, transposed=transposed)
        self._experts, self._part = experts, part

    def begin(self) -> None:
        """Read the factors and take this tensor's part of them."""
        a, b = (self._adapter.load(name) for name in self.names)
        a = a.reshape(self._experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, self._experts).transpose(0, 2, 1)
        self._pairs = []
        for expert in self._part.experts:
            one_a, one_b = a[expert], b[self._part.outputs, expert] * np.float32(self.scale)
            left, right = (one_a.T, one_b.T) if self._transposed else (one_b, one_a)
            self._pairs.append((np.ascontiguousarray(left), np.ascontiguousarray(right)))

    def apply(self, block: Float32, first: int) -> Float32:
        """Add the rows' part of the products."""
        result = block.copy()
        rows = len(self._pairs[0][0])
        for expert in range(first // rows, -(-(first + len(block)) // rows)):
            left, right = self._pairs[expert]
            begin, end = max(first, expert * rows), min(first + len(block), (expert + 1) * rows)
            result[begin - first : end - first] += left[begin - expert * rows : end - expert * rows] @ right
        return result

    def end(self) -> None:
        """Forget the factors."""
        del self._pairs


class Part:
    """Which experts, and which of their outputs, a tensor has."""

    def __init__(self, experts: Sequence[int], outputs: slice) -> None:
        self.experts, self.outputs = experts, outputs


class Magnitude(_Simple):
    """DoRA: gives every output the length that was learned. Comes right after the low-rank product."""

    def __init__(self, adapter: Adapter, name: str, *, by_column: bool) -> None:
        """Prepare; `by_column` where outputs are columns of the matrix."""
        self.scans = by_column
        self._adapter, self._name = adapter, name

    def begin(self) -> None:
        """Read the lengths."""
        self._magnitude = self._adapter.load(self._name).reshape(-1)
        self._squares: NDArray[np.float64] | float = 0.0

    def scan(self, block: Float32, first: int) -> None:
        """Sum up the columns."""
        self._squares = self._squares + np.einsum("rc,rc->c", block, block, dtype=np.float64)

    def apply(self, block: Float32, first: int) -> Float32:
        """Stretch the rows or columns."""
        if self.scans:
            return block * (self._magnitude / np.sqrt(self._squares).astype(np.float32))
        norms: Float32 = np.sqrt(np.einsum("rc,rc->r", block, block))
        factors: Float32 = self._magnitude[first : first + len(block)] / norms
        return block * factors[:, None]


class Scale(_Simple):
    """IA3: multiplies every row or every column."""

    def __init__(self, adapter: Adapter, name: str, *, by_column: bool) -> None:
        self._adapter, self._name, self._by_column = adapter, name, by_column

    def begin(self) -> None:
        """Read the factors."""
        self._factors = self._adapter.load(self._name).reshape(-1)

    def apply(self, block: Float32, first: int) -> Float32:
        """Multiply."""
        if self._by_column:
            return block * self._factors
        return block * self._factors[first : first + len(block), None]


class AddVector(_Simple):
    """Adds scale * vector to a tensor of one dimension, which is one row."""

    def __init__(self, adapter: Adapter, name: str, scale: float) -> None:
        self._adapter, self._name, self._scale = adapter, name, np.float32(scale)

    def apply(self, block: Float32, first: int) -> Float32:
        """Add."""
        return block + self._adapter.load(self._name) * self._scale


class Rows(_Simple):
    """Puts trained rows in the place of the base's."""

    def __init__(self, adapter: Adapter, name: str, numbers: Sequence[int]) -> None:
        """Prepare; the tensor's rows are those of the given numbers, in that order."""
        self._adapter, self._name = adapter, name
        self._numbers = np.array(numbers, np.int64)

    def apply(self, block: Float32, first: int) -> Float32:
        """Replace."""
        here = (first <= self._numbers) & (self._numbers < first + len(block))
        result = block.copy()
        result[self._numbers[here] - first] = self._adapter.load(self._name)[here]
        return result


class FourBitRounding(_Simple):
    """Rounds the base's numbers to 4 bits and back, as bitsandbytes does when it loads the base for training."""

    align = four_bits.BLOCK

    def __init__(self, kind: four_bits.Kind, dtype: str, *, double_quant: bool) -> None:
        """Prepare; `dtype` is what the numbers come back in: that of the base's tensor."""
        self.scans = True
        self._kind, self._dtype, self._double_quant = kind, dtype, double_quant

    def begin(self) -> None:
        """Forget an earlier tensor."""
        self._found: list[Float32] = []
        self._stored: Float32 | None = None

    def scan(self, block: Float32, first: int) -> None:
        """Find the scales."""
        self._found.append(four_bits.block_scales(block.reshape(-1)))

    def apply(self, block: Float32, first: int) -> Float32:
        """Round."""
        if self._stored is None:
            self._scales = np.concatenate(self._found)
            self._stored = four_bits.double_quantized(self._scales) if self._double_quant else self._scales
        begin = first * block.shape[1] // four_bits.BLOCK
        multiples = four_bits.quantized(block.reshape(-1), self._scales[begin:], self._kind)
        product = four_bits.dequantized(multiples, self._stored[begin:])
        return to_float32(from_float32(product, self._dtype), self._dtype).reshape(block.shape)

    def end(self) -> None:
        """Forget the scales."""
        self._found, self._stored = [], None


class EightBitRounding(_Simple):
    """Rounds the base's numbers to 8 bits with a scale per row and back, as bitsandbytes does (LLM.int8)."""

    def __init__(self, dtype: str) -> None:
        """Prepare; `dtype` is what the numbers come back in: that of the base's tensor."""
        self._dtype = dtype

    def apply(self, block: Float32, first: int) -> Float32:
        """Round."""
        half = block.astype(np.float16).astype(np.float32)
        scales = np.abs(half).max(axis=1, keepdims=True)
        steps = np.rint(half * (np.float32(127) / np.maximum(scales, np.float32(1e-38))))
        product = steps * (scales / np.float32(127))
        return to_float32(from_float32(product, self._dtype), self._dtype)
