"""What every kind of storage shares: the description of a stored file, the stop flag, the progress callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tunewright_trainer.errors import Preempted

Advance = Callable[[int], None]
"""Called with the bytes that just went through; negative when a part starts over. Called from several threads."""


def ignore(size: int) -> None:
    """Take a transfer's progress and do nothing with it."""


@dataclass(frozen=True)
class StoredFile:
    """One file in storage."""

    name: str
    """Path relative to the folder that was listed; the bare name for a single file."""
    size_bytes: int
    version: str
    """Changes whenever the content does: the ETag in S3, size and time of change on a file system."""


class Stop:
    """A request to stop, made by a signal handler and looked at by every loop that may run long.

    A plain attribute rather than a threading.Event: setting an Event in a signal handler can deadlock with the
    interrupted wait.
    """

    def __init__(self, outer: Stop | None = None) -> None:
        """Make a flag; a request to `outer` counts as one to this flag, too."""
        self.cause: str | None = None
        self._outer = outer

    def request(self, cause: str) -> None:
        """Ask for the stop; `cause` is told to people."""
        self.cause = cause

    def check(self) -> None:
        """Go on, or end here.

        Raises:
            Preempted: A stop was requested.
        """
        if self._outer is not None:
            self._outer.check()
        if self.cause is not None:
            raise Preempted(
                f"{self.cause}: the run ended before its result was published; a new attempt starts it again"
            )

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until a stop is requested.

        Raises:
            Preempted: A stop was requested.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.1, left))
        self.check()
