"""S3: the only module that imports boto3.

Every request runs in `_call`, which decides between three fates: an answer, an error that a person must mend, or an
outage, which is waited out. botocore's own retries stay few: its retry quota ends them after some 35 in a row, long
before a restart of an S3 service is over.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tunewright_api.run_config import StorageSettings
from tunewright_trainer.errors import InvalidConfiguration, StorageUnavailable
from tunewright_trainer.s3_errors import Contact, Outage, translate
from tunewright_trainer.s3_writer import PART_BYTES, S3Target
from tunewright_trainer.stream_writer import StreamWriter
from tunewright_trainer.transfer import Advance, Stop, StoredFile, ignore

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

OUTAGE_SECONDS = 120.0
"""How long one request is repeated once the service has answered: longer than a restart of a small S3 service."""
FIRST_CONTACT_SECONDS = 15.0
"""How long one is repeated before any answer came: then the address is wrong, which no waiting mends."""
STREAM_BYTES = 1024 * 1024
PARALLEL_TRANSFERS = 8
"""A single S3 connection gives some 50 to 100 MB/s; eight fill a 5 Gbit/s link."""

T = TypeVar("T")


class S3:
    """Objects of one S3 service, with the credentials of the environment. Safe to use from several threads.

    Every method may raise MissingBucket, AccessDenied, EndpointUnreachable, InvalidConfiguration (wrong region),
    StorageUnavailable (an outage outlasted OUTAGE_SECONDS) and Preempted.
    """

    def __init__(self, settings: StorageSettings, stop: Stop) -> None:
        self._stop = stop
        self._contact = Contact(settings, answered=False)
        try:
            self._client = _client(settings)
        except ValueError as error:
            raise InvalidConfiguration(f"storage.endpoint {settings.endpoint!r}: {error}") from None

    def stat(self, bucket: str, key: str) -> StoredFile:
        """Describe one object.

        A GET whose body is left unread rather than a HEAD: only a GET says in its error which of bucket, key and
        credentials is wrong.

        Raises:
            MissingFile: There is no such object.
        """

        def call() -> StoredFile:
            answer = self._client.get_object(Bucket=bucket, Key=key)
            answer["Body"].close()
            if "ETag" not in answer:
                raise Outage("the answer has no ETag, which every S3 object has")
            return StoredFile(key.rpartition("/")[2], answer["ContentLength"], answer["ETag"].strip('"'))

        return self._call(bucket, key, call)

    def listing(self, bucket: str, prefix: str) -> list[StoredFile]:
        """Describe all objects below a prefix; an empty list when there is none."""

        def call() -> list[StoredFile]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            entries = [entry for page in pages for entry in page.get("Contents", [])]
            return [
                StoredFile(entry["Key"].removeprefix(prefix), entry["Size"], entry["ETag"].strip('"'))
                for entry in entries
                if not entry["Key"].endswith("/")
            ]

        return self._call(bucket, prefix, call)

    def read(self, bucket: str, key: str, limit_bytes: int) -> tuple[bytes, str] | None:
        """Return content (at most `limit_bytes` and one) and ETag of a small object, or None where there is none."""

        def call() -> tuple[bytes, str] | None:
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response["Error"]["Code"] == "NoSuchKey":
                    return None
                raise
            with closing(answer["Body"]) as body:
                return body.read(limit_bytes + 1), answer["ETag"].strip('"')

        return self._call(bucket, key, call)

    def read_range(self, bucket: str, key: str, file: StoredFile, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of an object in the version that was described."""
        if length == 0:
            return b""
        span = f"bytes={start}-{start + length - 1}"

        def call() -> bytes:
            answer = self._client.get_object(Bucket=bucket, Key=key, Range=span, IfMatch=f'"{file.version}"')
            with closing(answer["Body"]) as body:
                data = body.read()
            if len(data) != length:
                raise Outage(f"{len(data)} of {length} bytes came")
            return data

        return self._call(bucket, key, call)

    def writer(self, bucket: str, key: str, size_bytes: int) -> StreamWriter:
        """Begin an object of known size whose parts are stored in the background; it replaces what stands there."""
        return StreamWriter(S3Target(self._client, self._call, bucket, key, size_bytes), size_bytes)

    def put(self, bucket: str, key: str, data: bytes, *, replaces: str | None) -> bool:
        """Write a small object; `replaces` is None (nothing may be there), an ETag, or `*` for anything.

        Returns:
            False when something else stands there. After an outage in the middle it may be our own earlier try.
        """
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces} if replaces != "*" else {}

        def call() -> bool:
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=data, **condition)  # type: ignore[arg-type]
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                    return False
                raise
            return True

        return self._call(bucket, key, call)

    def upload(self, source: Path, bucket: str, key: str, advance: Advance = ignore) -> None:
        """Store a file, in parallel parts when it is large. The service checks the SHA-256 of what it receives."""

        def call() -> None:
            self._stop.check()
            config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
            self._client.upload_file(str(source), bucket, key, Config=config, Callback=advance)

        self._call(bucket, key, call)

    def download(self, files: Sequence[tuple[str, str, StoredFile, Path]], advance: Advance = ignore) -> None:
        """Fetch objects (bucket, key, description, target), all parts of all files in parallel, and check them.

        A part must have its exact length and come from the version that was described; a whole file must have the
        MD5 that its ETag claims, where it is one.
        """
        with ThreadPoolExecutor(PARALLEL_TRANSFERS, "s3-download") as pool:
            jobs = [
                pool.submit(self._fetch_part, bucket, key, file, target, start, advance)
                for bucket, key, file, target in files
                for start in _allocate(target, file.size_bytes)
            ]
            _finish(pool, jobs)
        for bucket, key, file, target in files:
            self._check_md5(bucket, key, file, target)

    def delete_folder(self, bucket: str, prefix: str) -> None:
        """Remove all objects below a prefix, one request each: not every S3 service has the request for many."""
        for file in self.listing(bucket, prefix):
            key = prefix + file.name
            self._call(bucket, key, lambda key=key: self._client.delete_object(Bucket=bucket, Key=key))  # type: ignore[misc]

    def _fetch_part(self, bucket: str, key: str, file: StoredFile, target: Path, start: int, advance: Advance) -> None:
        length = min(PART_BYTES, file.size_bytes - start)
        span = f"bytes={start}-{start + length - 1}"

        def call() -> None:
            answer = self._client.get_object(Bucket=bucket, Key=key, Range=span, IfMatch=f'"{file.version}"')
            received = 0
            try:
                with target.open("r+b") as output, closing(answer["Body"]) as body:
                    output.seek(start)
                    for chunk in body.iter_chunks(STREAM_BYTES):
                        self._stop.check()
                        output.write(chunk)
                        received += len(chunk)
                        advance(len(chunk))
            # Whatever ended the part, it starts over: its bytes no longer count as progress.
            except BaseException:
                advance(-received)
                raise
            if received != length:
                advance(-received)
                raise Outage(f"{received} of {length} bytes came")

        self._call(bucket, key, call)

    def _check_md5(self, bucket: str, key: str, file: StoredFile, target: Path) -> None:
        if len(file.version) != 32:  # an object uploaded in parts has a longer one
            return
        first = _md5(target)
        if first == file.version:
            return
        for start in _allocate(target, file.size_bytes):
            self._fetch_part(bucket, key, file, target, start, ignore)
        # The same bytes twice: encrypted objects (SSE-KMS) have ETags that are no MD5 but look like one.
        if _md5(target) not in (first, file.version):
            raise StorageUnavailable(
                f"s3://{bucket}/{key}: two downloads gave different bytes; the transfer is damaged"
            )

    def _call(self, bucket: str, key: str, call: Callable[[], T]) -> T:
        """Run one request, again after failures that pass by themselves.

        Raises:
            TrainerError: What `translate` makes of an error that stays.
        """
        started = time.monotonic()
        attempt = 0
        while True:
            self._stop.check()
            try:
                result = call()
            except (ClientError, BotoCoreError, Outage, S3UploadFailedError) as error:
                patience = OUTAGE_SECONDS if self._contact.answered else FIRST_CONTACT_SECONDS
                out_of_time = time.monotonic() - started > patience
                final = translate(error, bucket, key, self._contact, out_of_time=out_of_time)
                if final is not None:
                    raise final from None
            else:
                self._contact.answered = True
                return result
            self._stop.sleep(min(10.0, 0.2 * 2**attempt) * random.uniform(0.5, 1))  # noqa: S311 - jitter
            attempt += 1


def _client(settings: StorageSettings) -> S3Client:
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=4 * PARALLEL_TRANSFERS,
        s3={"addressing_style": "path" if settings.path_style else "auto"},
        # Trailing checksums are unknown to many S3 services; the signature covers the content's SHA-256 anyway.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.session.Session(region_name=settings.region)
    return session.client("s3", endpoint_url=settings.endpoint, config=config)


def _allocate(target: Path, size_bytes: int) -> Iterable[int]:
    """Make a file of the final size and return the offsets of its parts."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.truncate(size_bytes)
    return range(0, size_bytes, PART_BYTES)


def _finish(pool: ThreadPoolExecutor, jobs: Sequence[Future[None]]) -> None:
    """Wait for all jobs; after the first error the ones that have not begun are dropped."""
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    pool.shutdown(wait=True, cancel_futures=True)
    for job in done:
        job.result()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
