"""An S3 object written in parts whose number and size are known from the beginning."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 16 * 1024 * 1024
MAX_PARTS = 9_900
"""S3 takes 10,000."""
_MIB = 1024 * 1024

T = TypeVar("T")


class Call(Protocol):
    """Runs one request, again after failures that pass by themselves; see `S3`."""

    def __call__(self, bucket: str, key: str, call: Callable[[], T]) -> T:
        """Return what the request returns."""


class S3Target:
    """The parts of one object: a plain put where there is only one, else a multipart upload."""

    def __init__(self, client: S3Client, call: Call, bucket: str, key: str, size_bytes: int) -> None:
        self.part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS // _MIB) * _MIB)
        self._client, self._call, self._bucket, self._key, self._size_bytes = client, call, bucket, key, size_bytes
        self._lock = threading.Lock()
        self._upload: str | None = None
        self._tags: dict[int, str] = {}

    def put(self, number: int, data: bytearray) -> None:
        """Store a part; see PartTarget."""
        if self._size_bytes <= self.part_bytes:
            self._request(
                lambda: self._client.put_object(Bucket=self._bucket, Key=self._key, Body=data)  # type: ignore[arg-type]
            )
            return
        upload = self._upload_id()
        answer = self._request(
            lambda: self._client.upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=upload,
                PartNumber=number + 1,
                Body=data,  # type: ignore[arg-type]  # boto3 takes a bytearray, its stubs do not know
            )
        )
        self._tags[number + 1] = answer["ETag"]

    def complete(self) -> None:
        """Make the object of its parts."""
        if self._upload is None:
            return
        upload = self._upload
        parts: list[CompletedPartTypeDef] = [{"PartNumber": n, "ETag": tag} for n, tag in sorted(self._tags.items())]

        def call() -> None:
            try:
                self._client.complete_multipart_upload(
                    Bucket=self._bucket, Key=self._key, UploadId=upload, MultipartUpload={"Parts": parts}
                )
            except ClientError as error:
                if error.response["Error"]["Code"] != "NoSuchUpload" or not self._is_there():
                    raise

        self._request(call)

    def abort(self) -> None:
        """Let the service forget the parts; one that does not answer keeps them until its own clean-up."""
        if self._upload is not None:
            # Not through `_call`: that refuses any request once a stop was asked for, and would wait for an outage.
            with contextlib.suppress(ClientError, BotoCoreError):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._upload)

    def _upload_id(self) -> str:
        with self._lock:
            if self._upload is None:
                answer = self._request(lambda: self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key))
                self._upload = answer["UploadId"]
            return self._upload

    def _is_there(self) -> bool:
        """Tell whether an earlier try, whose answer got lost, has made the object."""
        answer = self._client.head_object(Bucket=self._bucket, Key=self._key)
        return answer["ContentLength"] == self._size_bytes

    def _request(self, call: Callable[[], T]) -> T:
        return self._call(self._bucket, self._key, call)
