"""Writing a file of known size from its beginning: parts are hashed and stored in the background."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

PARTS_IN_FLIGHT = 4
"""Parts of a file that are stored at the same time: what the memory of a writer is made of."""


class PartTarget(Protocol):
    """Where the parts of one file go. `put` is called from several threads."""

    part_bytes: int
    """Size of every part but the last."""

    def put(self, number: int, data: bytearray) -> None:
        """Store part `number`, counted from 0."""

    def complete(self) -> None:
        """Put the file in its place; all parts are stored."""

    def abort(self) -> None:
        """Leave nothing behind. Raises nothing that a caller would have to handle."""


class StreamWriter:
    """A file on its way into storage. It is there under its name only after `finish`; use it from one thread."""

    def __init__(self, target: PartTarget, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        """The size that was announced."""
        self._target = target
        self._digest = hashlib.sha256()
        self._written = 0
        self._part = bytearray()
        self._parts = 0
        self._free = threading.Semaphore(PARTS_IN_FLIGHT)
        # A thread of its own for the digest: parts are stored in any order, but hashed in theirs.
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._pool = ThreadPoolExecutor(PARTS_IN_FLIGHT, "store-part")
        self._jobs: list[Future[None]] = []
        self._failed = threading.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append a copy of the data. Waits while too many parts are on their way.

        Raises:
            TrainerError, OSError: Storing an earlier part failed.
        """
        view = memoryview(data).cast("B")
        self._written += len(view)
        assert self._written <= self.size_bytes, "more bytes than announced"
        while len(view) > 0:
            taken = view[: self._target.part_bytes - len(self._part)]
            self._part += taken
            view = view[len(taken) :]
            if len(self._part) == self._target.part_bytes:
                self._send()

    def finish(self) -> str:
        """Wait for all parts, put the file in its place and return its SHA-256 in hex digits.

        Raises:
            TrainerError, OSError: Storing a part failed; nothing is there then.
        """
        assert self._written == self.size_bytes, "fewer bytes than announced"
        try:
            if self._part or not self._parts:
                self._send()
            self._wait()
            self._target.complete()
        # An interrupt too: an upload that was begun must not stay.
        except BaseException:
            self.abort()
            raise
        self._close()
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._failed.set()
        self._close()
        self._target.abort()

    def _send(self) -> None:
        self._free.acquire()
        if self._failed.is_set():
            self._free.release()
            self._wait()
        part, self._part = self._part, bytearray()
        hashed = self._hasher.submit(self._digest.update, part)
        number, self._parts = self._parts, self._parts + 1
        self._jobs.append(self._pool.submit(self._store, number, part, hashed.result))

    def _store(self, number: int, part: bytearray, hashed: Callable[[], None]) -> None:
        try:
            if not self._failed.is_set():
                self._target.put(number, part)
                hashed()
        # Whatever ended the part, the others need not be sent any more.
        except BaseException:
            self._failed.set()
            raise
        finally:
            self._free.release()

    def _wait(self) -> None:
        for job in self._jobs:
            job.result()

    def _close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._hasher.shutdown(wait=True)
