"""Writing a file of known size from its beginning: parts are hashed and stored in the background."""

from __future__ import annotations


class StreamWriter:
    """A file on its way into storage. It is there under its name only after `finish`; use it from one thread."""

    @property
    def size_bytes(self) -> int:
        """The size that was announced."""
        raise NotImplementedError

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append a copy of the data. Waits while too many parts are on their way.

        Raises:
            TrainerError, OSError: Storing an earlier part failed.
        """
        raise NotImplementedError

    def finish(self) -> str:
        """Wait for all parts, put the file in its place and return its SHA-256 in hex digits.

        Raises:
            TrainerError, OSError: Storing a part failed; nothing is there then.
        """
        raise NotImplementedError

    def abort(self) -> None:
        """Leave nothing behind."""
        raise NotImplementedError
