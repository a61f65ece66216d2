"""Where a merged model is written to: files that grow from their beginning, hashed on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tunewright_trainer.local import Folder
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.stream_writer import StreamWriter


@dataclass(frozen=True)
class WrittenFile:
    """A file that is whole and in its place."""

    name: str
    """Relative to the sink's folder."""
    bytes: int
    sha256: str
    """Hex digits."""


class FileWriter(Protocol):
    """One file on its way. It is there under its name only after `finish`."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; the data is copied, or written before this returns."""

    def finish(self) -> WrittenFile:
        """Put the file in its place."""

    def abort(self) -> None:
        """Leave nothing behind."""


class Sink(Protocol):
    """A folder that is written once."""

    def open(self, name: str, size_bytes: int) -> FileWriter:
        """Begin a file whose final size is known."""


class FolderSink:
    """A folder on this machine; made when it is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = Folder()

    def open(self, name: str, size_bytes: int) -> FileWriter:
        """Begin a file; see Sink.

        Raises:
            OSError: ENOSPC among others, from here and from every method of the writer.
        """
        path = self._path / name
        return _NamedWriter(name, self._folder.writer(str(path), path, size_bytes))


class StorageSink:
    """A folder in storage."""

    def __init__(self, storage: Storage, folder_uri: str) -> None:
        self._storage = storage
        self._folder_uri = folder_uri

    def open(self, name: str, size_bytes: int) -> FileWriter:
        """Begin a file; see Sink. This and the writer's methods raise what `Storage.writer` does."""
        return _NamedWriter(name, self._storage.writer(join(self._folder_uri, name), size_bytes))


class _NamedWriter:
    """A stream writer that knows the name of its file."""

    def __init__(self, name: str, stream: StreamWriter) -> None:
        self._name, self._stream = name, stream

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append a copy of the data."""
        self._stream.write(data)

    def finish(self) -> WrittenFile:
        """Put the file in its place."""
        return WrittenFile(self._name, self._stream.size_bytes, self._stream.finish())

    def abort(self) -> None:
        """Leave nothing behind."""
        self._stream.abort()
