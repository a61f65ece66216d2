"""Where the files of a model are read from: pieces of files, from a folder or from storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tunewright_trainer.storage import Storage
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
        raise NotImplementedError

    @property
    def uri(self) -> str:
        """The folder, for messages."""
        raise NotImplementedError

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes by name."""
        raise NotImplementedError

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file; see Reader."""
        raise NotImplementedError


class StorageReader:
    """Files in storage, in the versions that were listed: a file that is replaced meanwhile is an error, not a mix."""

    def __init__(self, storage: Storage, uri: str, files: Sequence[StoredFile]) -> None:
        """Prepare; nothing is read yet.

        Args:
            storage: Where from.
            uri: The folder.
            files: What of it may be read, as `Storage.listing` describes it.
        """
        raise NotImplementedError

    @property
    def uri(self) -> str:
        """The folder, for messages."""
        raise NotImplementedError

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes by name."""
        raise NotImplementedError

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file; see Reader. Raises what `Storage.read_range` does, too."""
        raise NotImplementedError
