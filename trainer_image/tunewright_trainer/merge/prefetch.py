"""Reads ahead: the pieces of files that a merge will ask for, in their order, in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from tunewright_trainer.merge.readers import Reader

SPAN_BYTES = 8 * 1024 * 1024
"""Neighbouring pieces are read together up to this size, so that small tensors cost no request each."""
AHEAD_BYTES = 64 * 1024 * 1024
"""Bytes that are on their way or wait to be taken: with THREADS connections enough for some 500 MB/s."""
THREADS = 6


@dataclass(frozen=True)
class Request:
    """A piece of a file."""

    reader: Reader
    file: str
    start: int
    length: int

    def read(self) -> bytes:
        """Read it now."""
        return self.reader.read(self.file, self.start, self.length)


class Prefetcher:
    """Gives the pieces in the order that was announced. Use it from one thread."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._spans = _spans(requests)
        self._pending: deque[tuple[Request, int, Future[bytes]]] = deque()
        self._pending_bytes = 0
        self._pool = ThreadPoolExecutor(THREADS, "read-ahead")
        self._span: Request | None = None
        self._left = 0
        self._data = b""

    def __enter__(self) -> Prefetcher:
        self._read_ahead()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, request: Request) -> memoryview:
        """Return the next piece. Raises what its reader does."""
        if not self._left:
            self._next_span()
        self._left -= 1
        span = self._span
        assert span is not None
        begin = request.start - span.start
        in_order = span.reader is request.reader and span.file == request.file
        assert in_order and 0 <= begin <= begin + request.length <= span.length, "pieces are taken in another order"  # noqa: PT018
        return memoryview(self._data)[begin : begin + request.length]

    def _next_span(self) -> None:
        self._data = b""
        self._span, self._left, job = self._pending.popleft()
        self._pending_bytes -= self._span.length
        self._data = job.result()
        self._read_ahead()

    def _read_ahead(self) -> None:
        while not self._pending or self._pending_bytes < AHEAD_BYTES:
            span, pieces = next(self._spans, (None, 0))
            if span is None:
                return
            self._pending.append((span, pieces, self._pool.submit(span.read)))
            self._pending_bytes += span.length


def _spans(requests: Iterable[Request]) -> Iterator[tuple[Request, int]]:
    """Join neighbours; yields each span with the number of its pieces."""
    span: Request | None = None
    pieces = 0
    for request in requests:
        if (
            span is not None
            and span.reader is request.reader
            and span.file == request.file
            and span.start + span.length == request.start
            and span.length + request.length <= SPAN_BYTES
        ):
            span = Request(span.reader, span.file, span.start, span.length + request.length)
            pieces += 1
            continue
        if span is not None:
            yield span, pieces
        span, pieces = request, 1
    if span is not None:
        yield span, pieces
