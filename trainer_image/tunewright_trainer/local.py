"""Storage on a mounted file system: persistent volumes, and plain paths of a local run."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunewright_trainer.errors import AccessDenied, MissingFile, StorageUnavailable
from tunewright_trainer.stream_writer import StreamWriter
from tunewright_trainer.transfer import Advance, StoredFile

COPY_BYTES = 4 * 1024 * 1024


class Folder:
    """Files below mount points. Every method takes the URI for messages beside the path it stands for."""

    def stat(self, uri: str, path: Path) -> StoredFile:
        """Describe one file.

        Raises:
            MissingFile: There is no such file.
            AccessDenied: The file system refuses.
        """
        with _translated(uri, path):
            if not path.is_file():
                raise FileNotFoundError
            return _describe(path, path.name)

    def listing(self, uri: str, path: Path) -> list[StoredFile]:
        """Describe all files below a folder; an empty list when there is none.

        Raises:
            AccessDenied: The file system refuses.
        """
        with _translated(uri, path):
            return sorted(_walk(path), key=lambda file: file.name)

    def read(self, uri: str, path: Path, limit_bytes: int) -> tuple[bytes, str] | None:
        """Return content (at most `limit_bytes` and one) and version of a small file, or None where there is none."""
        with _translated(uri, path):
            if not path.is_file():
                return None
            with path.open("rb") as file:
                return file.read(limit_bytes + 1), _describe(path, path.name).version

    def read_range(self, uri: str, path: Path, file: StoredFile, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file in the version that was described.

        Raises:
            MissingFile: There is no such file any more.
            StorageUnavailable: It was replaced meanwhile.
        """
        with _translated(uri, path), path.open("rb") as opened:
            if _describe(path, path.name).version != file.version:
                raise StorageUnavailable(f"{uri}: the file changed while it was read")
            return os.pread(opened.fileno(), length, start)

    def writer(self, uri: str, path: Path, size_bytes: int) -> StreamWriter:
        """Begin a file of known size that is in its place only when it is whole; it replaces what stands there."""
        with _translated(uri, path):
            return StreamWriter(FileTarget(path), size_bytes)

    def put(self, uri: str, path: Path, data: bytes, *, replaces: str | None) -> bool:
        """Write a small file whole or not at all.

        Args:
            uri: Name for messages.
            path: Where to.
            data: Content.
            replaces: None writes only where nothing is; else the version it may take the place of, or `*` for any.

        Returns:
            False when something else stands there.
        """
        with _translated(uri, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            temporary.write_bytes(data)
            try:
                if replaces is None:
                    # A hard link, unlike a rename, fails where the name is taken: that makes it a conditional put.
                    os.link(temporary, path)
                elif replaces == "*" or (path.is_file() and replaces == _describe(path, path.name).version):
                    temporary.replace(path)
                else:
                    return False
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            return True

    def upload(self, source: Path, uri: str, path: Path, advance: Advance) -> None:
        """Copy a file into storage."""
        with _translated(uri, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as reader, path.open("wb") as writer:
                while chunk := reader.read(COPY_BYTES):
                    writer.write(chunk)
                    advance(len(chunk))

    def download(self, uri: str, path: Path, target: Path) -> None:
        """Copy a file out of storage."""
        with _translated(uri, path):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def delete_folder(self, uri: str, path: Path) -> None:
        """Remove a folder and all in it."""
        with _translated(uri, path):
            if path.is_dir():
                shutil.rmtree(path)


class FileTarget:
    """The parts of one file, beside its place until all are there; see PartTarget."""

    part_bytes = COPY_BYTES

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        self._file = self._temporary.open("xb", buffering=0)

    def put(self, number: int, data: bytearray) -> None:
        """Store a part.

        Raises:
            OSError: ENOSPC among others.
        """
        view, position = memoryview(data), number * self.part_bytes
        while view:
            written = os.pwrite(self._file.fileno(), view, position)
            view, position = view[written:], position + written

    def complete(self) -> None:
        """Put the file in its place once its bytes are on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)

    def abort(self) -> None:
        """Remove the parts."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _walk(top: Path) -> Iterator[StoredFile]:
    """Describe the files below a folder. One that another writer removes meanwhile is not there."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(top, onerror=failed):
        for path in (Path(folder) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    yield _describe(path, path.relative_to(top).as_posix())


def _describe(path: Path, name: str) -> StoredFile:
    status = path.stat()
    return StoredFile(name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


@contextmanager
def _translated(uri: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{uri}: no such file ({path})" if uri != str(path) else f"{uri}: no such file") from None
    except PermissionError as error:
        raise AccessDenied(
            f"{uri}: {error.strerror} ({error.filename}); the trainer runs as user {os.getuid()}, group {os.getgid()}"
        ) from None
