"""The numbers of one merged tensor, block by block: read ahead, changed in float32, rounded once, written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tunewright_trainer.errors import VerificationFailed
from tunewright_trainer.merge.edits import Edit
from tunewright_trainer.merge.numbers import (
    FLOATS,
    ITEM_BYTES,
    Float32,
    all_finite,
    fits,
    from_bytes,
    from_float32,
    squares,
)
from tunewright_trainer.merge.plan import MergedTensor
from tunewright_trainer.merge.prefetch import SPAN_BYTES, Request
from tunewright_trainer.merge.sources import Source

_COMPUTED_ELEMENTS = 128 * 1024
"""Numbers that are worked on at once: some arrays of half a megabyte, which stay in the processor's cache."""

Take = Callable[[Request], memoryview]
Write = Callable[[memoryview], None]


@dataclass
class Outcome:
    """What became of a tensor."""

    changed: bool = False
    """At least one number differs from the base's after rounding."""
    delta_squares: float = 0.0
    """Sum of squares of the change before rounding."""
    base_squares: float = 0.0

    @property
    def relative_delta(self) -> float:
        """Norm of the change over the base's, infinite where that is 0."""
        if self.base_squares == 0:
            return math.inf if self.delta_squares else 0.0
        return math.sqrt(self.delta_squares / self.base_squares)


@dataclass(frozen=True)
class Grid:
    """A tensor as a matrix, cut into blocks of rows."""

    rows: int
    columns: int
    step: int
    """Rows of a block that is read at once."""
    inner_step: int
    """Rows of a block that is worked on at once."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield first and last row of every block."""
        for first in range(0, self.rows, self.step):
            yield first, min(first + self.step, self.rows)

    def inner(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cut a block further."""
        for row in range(first, last, self.inner_step):
            yield row, min(row + self.inner_step, last)


def grid_of(tensor: MergedTensor) -> Grid:
    """Choose blocks of rows that all edits can work with."""
    shape = tensor.source.shape
    elements = math.prod(shape)
    rows = elements
    if tensor.edits:
        rows = tensor.rows or math.prod(shape[:-1])
    columns = elements // rows if rows else 0
    align = math.lcm(tensor.source.align, *(edit.align for edit in tensor.edits))
    multiple = align // math.gcd(align, columns) if columns else 1

    def fitting(wanted: int) -> int:
        return max(multiple, wanted // max(1, columns) // multiple * multiple)

    read = SPAN_BYTES // ITEM_BYTES[tensor.source.dtype]
    return Grid(rows, columns, fitting(read), fitting(_COMPUTED_ELEMENTS))


def requests_of(tensor: MergedTensor) -> Iterator[Request]:
    """Yield the pieces of files that `write_tensor` will take, in its order."""
    grid = grid_of(tensor)
    scans = sum(edit.scans for edit in tensor.edits)
    for last_pass in [False] * scans + [True]:
        for first, last in grid.blocks():
            if last_pass and tensor.base is not None:
                yield _request(tensor.base, grid, first, last)
            yield _request(tensor.source, grid, first, last)


def write_tensor(tensor: MergedTensor, dtype: str, take: Take, write: Write) -> Outcome:
    """Compute a tensor and write its bytes.

    Args:
        tensor: What.
        dtype: Number format of the result.
        take: Gives the pieces of `requests_of`.
        write: Told the bytes, in their order.

    Raises:
        VerificationFailed: A number of it is not finite.
    """
    outcome = Outcome()
    for edit in tensor.edits:
        edit.begin()
    # Numbers out of range show in the result, which is checked.
    with np.errstate(all="ignore"):
        for place, edit in enumerate(tensor.edits):
            if edit.scans:
                _scan(tensor, tensor.edits[:place], edit, take)
        _write(tensor, dtype, take, write, outcome)
    for edit in tensor.edits:
        edit.end()
    return outcome


def _scan(tensor: MergedTensor, before: tuple[Edit, ...], edit: Edit, take: Take) -> None:
    grid = grid_of(tensor)
    for first, last in grid.blocks():
        data = take(_request(tensor.source, grid, first, last))
        for start, end in grid.inner(first, last):
            block = _decode(tensor.source, grid, data, first, start, end)
            for earlier in before:
                block = earlier.apply(block, start)
            edit.scan(block, start)


def _write(tensor: MergedTensor, dtype: str, take: Take, write: Write, outcome: Outcome) -> None:
    grid = grid_of(tensor)
    copies = tensor.source.is_plain and not tensor.edits and tensor.source.dtype == dtype and tensor.base is None
    for first, last in grid.blocks():
        base_data = take(_request(tensor.base, grid, first, last)) if tensor.base is not None else None
        data = take(_request(tensor.source, grid, first, last))
        if copies:
            if dtype in FLOATS and not all_finite(from_bytes(data, dtype), dtype):
                raise _not_finite(tensor, "those of the base are not")
            write(data)
            continue
        for start, end in grid.inner(first, last):
            old = new = _decode(tensor.source, grid, data, first, start, end)
            if tensor.base is not None and base_data is not None:
                old = _decode(tensor.base, grid, base_data, first, start, end)
            for edit in tensor.edits:
                new = edit.apply(new, start)
            if not fits(new, dtype):
                raise _not_finite(tensor, "too large for its number format, or those of the base are not")
            result = from_float32(new, dtype)
            if tensor.kind == "Delta" or base_data is not None:
                outcome.changed = outcome.changed or not np.array_equal(result, from_float32(old, dtype))
                outcome.base_squares += squares(old)
                outcome.delta_squares += squares(np.subtract(new, old, out=old))
            write(result.reshape(-1).data.cast("B"))


def _request(source: Source, grid: Grid, first: int, last: int) -> Request:
    return source.request(first * grid.columns, last * grid.columns)


def _decode(source: Source, grid: Grid, data: memoryview, first: int, start: int, end: int) -> Float32:
    """Return rows `start` up to `end` out of the data of a block that begins with row `first`."""
    offset = _request(source, grid, first, start).length
    length = _request(source, grid, start, end).length
    block = source.decode(data[offset : offset + length], start * grid.columns)
    return block.reshape(end - start, grid.columns)


def _not_finite(tensor: MergedTensor, why: str) -> VerificationFailed:
    return VerificationFailed(
        f"tensor {tensor.name} of the merged model has numbers that are NaN or infinite ({why} finite); nothing is "
        "published"
    )
