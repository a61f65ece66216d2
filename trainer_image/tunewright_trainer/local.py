"""Storage on a mounted file system: persistent volumes, and plain paths of a local run."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunewright_trainer.errors import AccessDenied, MissingFile
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
