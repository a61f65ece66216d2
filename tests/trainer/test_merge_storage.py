"""Reading and writing in pieces, and a merge from S3 to S3, with a service that fails meanwhile."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.s3 import S3Server
from tests.s3_proxy import Proxy, proxied
from tests.trainer.kit import Bucket
from tests.trainer.merge_files import NORM, A, B, Q, merge_folders, normal, write_adapter, write_model
from tests.trainer.s3_fixtures import bucket, make_storage, server, shared_bucket, storage
from tunewright_api.run_config import StorageSettings
from tunewright_trainer import s3, s3_writer
from tunewright_trainer.errors import InvalidModel, MissingFile, Preempted, StorageUnavailable
from tunewright_trainer.merge.adapter import load_adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.readers import FolderReader, StorageReader
from tunewright_trainer.merge.sinks import StorageSink
from tunewright_trainer.merge.stream import MergeFindings, merge
from tunewright_trainer.storage import Storage
from tunewright_trainer.stream_writer import StreamWriter
from tunewright_trainer.transfer import Stop

__all__ = ["bucket", "server", "shared_bucket", "storage"]
MIB = 1024 * 1024


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    """A proxy in front of the server that breaks what the test asks for."""
    with proxied(server) as running:
        yield running


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of 5 MiB, the least that S3 takes, so that a test's file has several."""
    monkeypatch.setattr(s3_writer, "PART_BYTES", 5 * MIB)
    return 5 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """Storage on a mounted volume."""
    return Storage(StorageSettings(), pvc_root=tmp_path / "volumes")


def write(storage: Storage, uri: str, data: bytes, piece: int = MIB + 7) -> str:
    """Write a file in pieces and return the SHA-256 that the writer tells."""
    writer = storage.writer(uri, len(data))
    for start in range(0, len(data), piece):
        writer.write(memoryview(data)[start : start + piece])
    return writer.finish()


def fill(writer: StreamWriter) -> None:
    """Write 24 MiB."""
    for _ in range(4):
        writer.write(bytes(6 * MIB))


def unfinished(bucket: Bucket) -> list[Any]:
    """Return the multipart uploads that are not completed."""
    return list(bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", []))


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 5 * MIB + 1, 17 * MIB])
def test_a_file_is_written_in_parts(storage: Storage, bucket: Bucket, small_parts: int, size: int) -> None:
    """Whatever the size, the object has the bytes, and the writer knows their hash."""
    data = os.urandom(size)
    assert write(storage, f"s3://{bucket.name}/out/file", data) == hashlib.sha256(data).hexdigest()
    assert bucket.client.get_object(Bucket=bucket.name, Key="out/file")["Body"].read() == data
    assert unfinished(bucket) == []


def test_parts_grow_with_the_file() -> None:
    """S3 takes 10,000 parts of an object; 5 TB have larger ones."""
    assert s3_writer.S3Target(None, None, "b", "k", 10**9).part_bytes == 16 * MIB  # type: ignore[arg-type]
    large = s3_writer.S3Target(None, None, "b", "k", 5 * 10**12)  # type: ignore[arg-type]
    assert 5 * 10**12 / large.part_bytes < 9_901
    assert large.part_bytes % MIB == 0


def test_a_file_that_is_not_finished_is_not_there(storage: Storage, bucket: Bucket, small_parts: int) -> None:
    """An abort leaves neither an object nor parts that somebody would pay for."""
    writer = storage.writer(f"s3://{bucket.name}/file", 17 * MIB)
    writer.write(bytes(12 * MIB))
    writer.abort()
    assert bucket.stored() == []
    assert unfinished(bucket) == []


def test_a_disturbed_upload_is_repeated(bucket: Bucket, proxy: Proxy, small_parts: int) -> None:
    """Errors of the service and lost connections only delay; an answer that got lost is not mistaken for a failure."""
    data = os.urandom(17 * MIB)
    for method, faults in (
        ("PUT", ["503", "drop", "500", "drop"]),
        ("POST", ["503", "drop"]),
        ("POST", ["pass", "truncate"]),
    ):
        proxy.only, proxy.faults = method, deque(faults)
        write(make_storage(proxy.endpoint), f"s3://{bucket.name}/file", data)
        assert not proxy.faults
        assert bucket.client.get_object(Bucket=bucket.name, Key="file")["Body"].read() == data


def test_an_upload_that_fails_for_good(
    bucket: Bucket, proxy: Proxy, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the service stays away in the middle, the writer says so, and nothing is there."""
    monkeypatch.setattr(s3, "OUTAGE_SECONDS", 0.5)
    storage = make_storage(proxy.endpoint)
    writer = storage.writer(f"s3://{bucket.name}/file", 30 * MIB)
    writer.write(bytes(6 * MIB))
    proxy.only, proxy.always = "PUT", "503"
    with pytest.raises(StorageUnavailable, match="did not serve the request"):
        fill(writer)
    writer.abort()
    assert bucket.stored() == []
    assert unfinished(bucket) == []


def test_a_stop_ends_an_upload(bucket: Bucket, small_parts: int) -> None:
    """After SIGTERM no further part is sent, and those that were are removed."""
    stop = Stop()
    storage = Storage(make_storage(bucket.server.endpoint).settings, stop=stop)
    writer = storage.writer(f"s3://{bucket.name}/file", 30 * MIB)
    writer.write(bytes(6 * MIB))
    stop.request("SIGTERM")
    with pytest.raises(Preempted):
        fill(writer)
    writer.abort()
    assert unfinished(bucket) == []


def test_a_piece_of_an_object(storage: Storage, bucket: Bucket) -> None:
    """Exactly the bytes that were asked for, of the version that was described."""
    data = os.urandom(1000)
    bucket.put("file", data)
    uri = f"s3://{bucket.name}/file"
    file = storage.stat(uri)
    assert storage.read_range(uri, file, 10, 100) == data[10:110]
    assert storage.read_range(uri, file, 1000, 0) == b""
    bucket.put("file", os.urandom(1000))
    with pytest.raises(StorageUnavailable, match="the object changed while it was read"):
        storage.read_range(uri, file, 10, 100)
    bucket.client.delete_object(Bucket=bucket.name, Key="file")
    with pytest.raises(MissingFile):
        storage.read_range(uri, file, 10, 100)


def test_a_truncated_piece_is_read_again(bucket: Bucket, proxy: Proxy) -> None:
    """A body that ends early is not taken for the piece."""
    data = os.urandom(100_000)
    bucket.put("file", data)
    storage = make_storage(proxy.endpoint)
    file = storage.stat(f"s3://{bucket.name}/file")
    proxy.faults = deque(["truncate", "503", "truncate"])
    assert storage.read_range(f"s3://{bucket.name}/file", file, 5, 90_000) == data[5:90_005]
    assert not proxy.faults


def test_files_of_a_volume(folder: Storage, tmp_path: Path) -> None:
    """A volume works as S3 does: pieces of one version, files that are whole or not there."""
    data = os.urandom(9 * MIB)
    uri = "pvc://claim/out/file"
    writer = folder.writer(uri, len(data))
    writer.write(data[: 5 * MIB])
    path = tmp_path / "volumes/claim/out/file"
    assert not path.exists()
    writer.write(data[5 * MIB :])
    assert writer.finish() == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    file = folder.stat(uri)
    assert folder.read_range(uri, file, 10, 100) == data[10:110]
    path.write_bytes(b"another")
    with pytest.raises(StorageUnavailable, match="the file changed while it was read"):
        folder.read_range(uri, file, 0, 4)
    aborted = folder.writer(uri, 10)
    aborted.write(b"12345")
    aborted.abort()
    assert path.read_bytes() == b"another"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A base of some megabytes in two shards, and an adapter."""
    stored = ("BF16", np.random.default_rng(0).integers(0, 0x3F80, (3000, 1000), dtype=np.uint16))
    base = write_model(
        tmp_path / "base", {"model.embed_tokens.weight": stored}, {Q: normal(2000, 600), NORM: normal(600)}
    )
    adapter = write_adapter(tmp_path / "adapter", {A: normal(2, 600), B: normal(2000, 2)})
    return base, adapter


def upload(bucket: Bucket, base: Path) -> str:
    """Store the base in the bucket and return its URI."""
    for path in base.iterdir():
        bucket.put(f"base/{path.name}", path.read_bytes())
    return f"s3://{bucket.name}/base"


def merge_stored(storage: Storage, uri: str, adapter: Path, target: str, **options: Any) -> MergeFindings:
    """Merge from storage to storage."""
    base = Checkpoint(StorageReader(storage, uri, storage.listing(uri)))
    return merge(base, load_adapter(adapter), StorageSink(storage, target), **options)


def test_from_s3_to_s3(storage: Storage, bucket: Bucket, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """What is merged in storage is, byte for byte, what is merged on this machine."""
    base, adapter = inputs
    target = f"s3://{bucket.name}/out/merged"
    findings = merge_stored(storage, upload(bucket, base), adapter, target, max_shard_bytes=6_000_000)
    merge_folders(base, adapter, tmp_path / "here", max_shard_bytes=6_000_000)
    stored = {file.name: file.size_bytes for file in storage.listing(target)}
    assert stored == dict(FolderReader(tmp_path / "here").files)
    for file in findings.files:
        content = bucket.client.get_object(Bucket=bucket.name, Key=f"out/merged/{file.name}")["Body"].read()
        assert content == (tmp_path / "here" / file.name).read_bytes(), file.name
        assert hashlib.sha256(content).hexdigest() == file.sha256
    assert len([name for name in stored if name.endswith(".safetensors")]) == 2


def test_a_disturbed_merge_gives_the_same(
    bucket: Bucket, proxy: Proxy, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Reads and writes that fail on the way are repeated without a trace in the result."""
    base, adapter = inputs
    uri = upload(bucket, base)
    storage = make_storage(proxy.endpoint)
    reader = StorageReader(storage, uri, storage.listing(uri))
    checkpoint = Checkpoint(reader)
    proxy.faults = deque(["truncate", "503", "drop", "truncate", "500", "drop", "truncate"])
    merge(checkpoint, load_adapter(adapter), StorageSink(storage, f"s3://{bucket.name}/out"))
    assert not proxy.faults
    merge_folders(base, adapter, tmp_path / "here")
    content = bucket.client.get_object(Bucket=bucket.name, Key="out/model.safetensors")["Body"].read()
    assert content == (tmp_path / "here/model.safetensors").read_bytes()


def test_a_base_that_is_replaced_meanwhile(storage: Storage, bucket: Bucket, inputs: tuple[Path, Path]) -> None:
    """Versions are never mixed: the merge ends, without weights."""
    base, adapter = inputs
    uri = upload(bucket, base)
    checkpoint = Checkpoint(StorageReader(storage, uri, storage.listing(uri)))
    bucket.put("base/model-00002-of-00002.safetensors", (base / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(StorageUnavailable, match="the object changed while it was read"):
        merge(checkpoint, load_adapter(adapter), StorageSink(storage, f"s3://{bucket.name}/out"))
    assert bucket.stored("out/") == []
    assert unfinished(bucket) == []


def test_what_is_not_in_storage(storage: Storage, bucket: Bucket, inputs: tuple[Path, Path]) -> None:
    """A shard that is missing is told from the listing alone."""
    base, adapter = inputs
    uri = upload(bucket, base)
    bucket.client.delete_object(Bucket=bucket.name, Key="base/model-00001-of-00002.safetensors")
    with pytest.raises(InvalidModel, match="1 of 2 weight files are missing: model-00001-of-00002"):
        merge_stored(storage, uri, adapter, f"s3://{bucket.name}/out")
