"""Storage by URI: s3://bucket/key, pvc://claim/path and, in local runs, plain paths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.run_config import PVC_MOUNT_ROOT, StorageSettings
from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.local import Folder
from tunewright_trainer.stream_writer import StreamWriter
from tunewright_trainer.transfer import Advance, Stop, StoredFile, ignore

if TYPE_CHECKING:
    from tunewright_trainer.s3 import S3


def join(folder_uri: str, name: str) -> str:
    """Return the URI of `name` below a folder."""
    return f"{folder_uri.rstrip('/')}/{name}"


class Storage:
    """Reads and writes files by URI. Safe to use from several threads.

    Every method may raise AccessDenied, InvalidConfiguration, StorageUnavailable, Preempted and, for s3://,
    MissingBucket and EndpointUnreachable.
    """

    def __init__(
        self,
        settings: StorageSettings,
        *,
        stop: Stop | None = None,
        local: bool = False,
        pvc_root: Path = Path(PVC_MOUNT_ROOT),
    ) -> None:
        """Prepare; nothing is contacted yet.

        Args:
            settings: The S3 service.
            stop: Ends long operations when it is requested. Default: they run to their end.
            local: Allow plain paths where URIs stand.
            pvc_root: pvc://claim/path is pvc_root/claim/path.
        """
        self.settings = settings
        """The S3 service."""
        self._stop = stop or Stop()
        self._local = local
        self._pvc_root = pvc_root
        self._folder = Folder()

    @cached_property
    def _s3(self) -> S3:
        # Imported on first use: boto3 costs half a second, which the worker's start must not wait for.
        from tunewright_trainer.s3 import S3

        return S3(self.settings, self._stop)

    @property
    def is_local(self) -> bool:
        """Whether plain paths may stand where URIs do."""
        return self._local

    def local_path(self, uri: str) -> Path | None:
        """Return the path of a mounted or local file, None for s3://.

        Raises:
            InvalidConfiguration: The URI is of no kind that is known here.
        """
        if uri.startswith("s3://"):
            return None
        if uri.startswith("pvc://"):
            return self._pvc_root / uri.removeprefix("pvc://")
        if self._local and uri.startswith(("/", "./", "../")):
            return Path(uri).absolute()
        raise InvalidConfiguration(f"{uri!r}: use s3://bucket/key or pvc://claim/path")

    def stat(self, uri: str) -> StoredFile:
        """Describe one file.

        Raises:
            MissingFile: There is no such file.
        """
        path = self.local_path(uri)
        return self._s3.stat(*_split(uri)) if path is None else self._folder.stat(uri, path)

    def listing(self, folder_uri: str) -> list[StoredFile]:
        """Describe all files below a folder; an empty list when there is none."""
        path = self.local_path(folder_uri)
        return self._s3.listing(*_split_folder(folder_uri)) if path is None else self._folder.listing(folder_uri, path)

    def read(self, uri: str, limit_bytes: int) -> tuple[bytes, str] | None:
        """Return content (at most `limit_bytes` and one) and version of a small file, or None where there is none."""
        path = self.local_path(uri)
        if path is None:
            return self._s3.read(*_split(uri), limit_bytes)
        return self._folder.read(uri, path, limit_bytes)

    def read_range(self, uri: str, file: StoredFile, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file in the version that was described.

        Raises:
            MissingFile: There is no such file any more.
            StorageUnavailable: It was replaced meanwhile.
        """
        path = self.local_path(uri)
        if path is None:
            return self._s3.read_range(*_split(uri), file, start, length)
        return self._folder.read_range(uri, path, file, start, length)

    def writer(self, uri: str, size_bytes: int) -> StreamWriter:
        """Begin a file of known size that is written from its beginning while its parts are stored in the background.

        It takes the place of what stands there. A file that is never finished is not there. The writer's methods raise
        OSError (ENOSPC among others) where the storage is a file system.
        """
        path = self.local_path(uri)
        if path is None:
            return self._s3.writer(*_split(uri), size_bytes)
        return self._folder.writer(uri, path, size_bytes)

    def put(self, uri: str, data: bytes, *, replaces: str | None) -> bool:
        """Write a small file whole or not at all.

        Args:
            uri: Where to.
            data: Content.
            replaces: None writes only where nothing is; else the version it may take the place of, or `*` for any.

        Returns:
            False when something else stands there.
        """
        path = self.local_path(uri)
        if path is None:
            return self._s3.put(*_split(uri), data, replaces=replaces)
        return self._folder.put(uri, path, data, replaces=replaces)

    def upload(self, source: Path, uri: str, advance: Advance = ignore) -> None:
        """Store a file."""
        path = self.local_path(uri)
        if path is None:
            self._s3.upload(source, *_split(uri), advance)
        else:
            self._folder.upload(source, uri, path, advance)

    def download(self, files: Sequence[tuple[str, StoredFile, Path]], advance: Advance = ignore) -> None:
        """Copy files (URI, description, target) to this machine, in parallel, and check that they are whole.

        Raises:
            MissingFile: One is not there any more.
        """
        remote = [(*_split(uri), file, target) for uri, file, target in files if self.local_path(uri) is None]
        for uri, file, target in files:
            path = self.local_path(uri)
            if path is not None:
                self._folder.download(uri, path, target)
                advance(file.size_bytes)
        if remote:
            self._s3.download(remote, advance)

    def delete_folder(self, folder_uri: str) -> None:
        """Remove a folder and all in it."""
        path = self.local_path(folder_uri)
        if path is None:
            self._s3.delete_folder(*_split_folder(folder_uri))
        else:
            self._folder.delete_folder(folder_uri, path)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _split_folder(uri: str) -> tuple[str, str]:
    bucket, key = _split(uri)
    return bucket, f"{key.rstrip('/')}/" if key else ""
