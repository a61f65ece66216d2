"""Where the files of a model are read from: pieces of files, from a folder or from storage."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tunewright_trainer.errors import InvalidModel, MissingFile
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import StoredFile


class Reader(Protocol):
    """The files of one folder. Safe to use from several threads."""

    @property
    def uri(self) -> str:
        """The folder, for messages."""

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes by name."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file.

        Raises:
            MissingFile: There is no such file.
            InvalidModel: The file ends before that.
        """


class FolderReader:
    """Files of a folder on this machine."""

    def __init__(self, path: Path, uri: str | None = None) -> None:
        """Look what is there.

        Args:
            path: The folder.
            uri: Its name in messages. Default: the path.
        """
        self.uri = uri or str(path)
        self._path = path
        found = path.iterdir() if path.is_dir() else iter(())
        self.files: Mapping[str, int] = {file.name: file.stat().st_size for file in sorted(found) if file.is_file()}

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file; see Reader."""
        place = f"{self.uri}/{name}"
        try:
            with (self._path / name).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, start)
        except FileNotFoundError:
            raise MissingFile(f"{place}: no such file") from None
        if len(data) != length:
            raise InvalidModel(f"{place}: truncated: it has no {length} bytes at {start}")
        return data


class StorageReader:
    """Files in storage, in the versions that were listed: a file that is replaced meanwhile is an error, not a mix."""

    def __init__(self, storage: Storage, uri: str, files: Sequence[StoredFile]) -> None:
        """Prepare; nothing is read yet.

        Args:
            storage: Where from.
            uri: The folder.
            files: What of it may be read, as `Storage.listing` describes it.
        """
        self.uri = uri.rstrip("/")
        self._storage = storage
        self._stored = {file.name: file for file in files}
        self.files: Mapping[str, int] = {file.name: file.size_bytes for file in files}

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file; see Reader. Raises what `Storage.read_range` does, too."""
        file = self._stored.get(name)
        if file is None:
            raise MissingFile(f"{self.uri}/{name}: no such file")
        if start + length > file.size_bytes:
            raise InvalidModel(f"{self.uri}/{name}: truncated: it has no {length} bytes at {start}")
        return self._storage.read_range(join(self.uri, name), file, start, length)
