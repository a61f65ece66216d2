"""S3 for real: transfers, conditional puts, every error a user can cause, and a service that fails for a while."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.cluster.s3 import S3Server
from tests.s3_proxy import Proxy, proxied
from tests.trainer.kit import Bucket
from tests.trainer.s3_fixtures import bucket, make_storage, server, shared_bucket, storage
from tunewright_trainer import s3
from tunewright_trainer.errors import (
    AccessDenied,
    EndpointUnreachable,
    InvalidConfiguration,
    MissingBucket,
    MissingFile,
    Preempted,
    StorageUnavailable,
    TrainerError,
)
from tunewright_trainer.s3_writer import PART_BYTES
from tunewright_trainer.storage import Storage
from tunewright_trainer.transfer import Stop

__all__ = ["bucket", "server", "shared_bucket", "storage"]


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    """A proxy in front of the server that breaks what the test asks for."""
    with proxied(server) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for outages and first contacts shortened to what a test can afford."""
    monkeypatch.setattr(s3, "OUTAGE_SECONDS", 1.5)
    monkeypatch.setattr(s3, "FIRST_CONTACT_SECONDS", 0.5)


def fetch(storage: Storage, bucket: Bucket, key: str, target: Path, sizes: list[int] | None = None) -> Path:
    """Describe and download one object."""
    uri = f"s3://{bucket.name}/{key}"
    storage.download([(uri, storage.stat(uri), target)], (sizes if sizes is not None else []).append)
    return target


@pytest.mark.parametrize("size", [0, 1, 5_000_000, PART_BYTES, 2 * PART_BYTES + 7])
def test_a_file_goes_up_and_comes_back(storage: Storage, bucket: Bucket, tmp_path: Path, size: int) -> None:
    """Bytes are the same after a round trip, in one part or many, and progress adds up both ways."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    up: list[int] = []
    down: list[int] = []
    storage.upload(source, f"s3://{bucket.name}/folder/file", up.append)
    assert fetch(storage, bucket, "folder/file", tmp_path / "target", down).read_bytes() == source.read_bytes()
    assert (sum(up), sum(down)) == (size, size)
    assert storage.listing(f"s3://{bucket.name}/folder") == [storage.stat(f"s3://{bucket.name}/folder/file")]


def test_a_listing_is_one_of_the_folder(storage: Storage, bucket: Bucket) -> None:
    """Neighbours whose names begin alike are other folders; folder marks are no files; more than one page is read."""
    bucket.put("base/config.json", "x")
    bucket.put("base/sub/deep.json", "x")
    bucket.put("base/", "")
    bucket.put("base-2/config.json", "x")
    assert [f.name for f in storage.listing(f"s3://{bucket.name}/base")] == ["config.json", "sub/deep.json"]
    assert storage.listing(f"s3://{bucket.name}/nothing") == []


def test_read_gives_content_or_none(storage: Storage, bucket: Bucket) -> None:
    """A small object comes with its version; one that is not there is None, not an error."""
    bucket.put("a.json", "{}")
    read = storage.read(f"s3://{bucket.name}/a.json", 100)
    assert read is not None
    assert read == (b"{}", storage.stat(f"s3://{bucket.name}/a.json").version)
    assert storage.read(f"s3://{bucket.name}/b.json", 100) is None


def test_a_conditional_put_has_one_winner(storage: Storage, bucket: Bucket) -> None:
    """Of many writers at once exactly one gets the name."""
    won: list[int] = []

    def write(number: int) -> None:
        if storage.put(f"s3://{bucket.name}/manifest.json", str(number).encode(), replaces=None):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = storage.read(f"s3://{bucket.name}/manifest.json", 100)
    assert stored is not None
    assert [str(n).encode() for n in won] == [stored[0]]


def test_a_put_replaces_only_the_version_it_names(storage: Storage, bucket: Bucket) -> None:
    """With a version a put is refused once something else stands there; with * it always goes through."""
    uri = f"s3://{bucket.name}/a"
    assert storage.put(uri, b"1", replaces=None)
    version = storage.stat(uri).version
    assert storage.put(uri, b"2", replaces=version)
    assert not storage.put(uri, b"3", replaces=version)
    assert storage.put(uri, b"4", replaces="*")
    assert storage.read(uri, 10) == (b"4", storage.stat(uri).version)


def test_delete_folder_takes_only_that_folder(storage: Storage, bucket: Bucket) -> None:
    """Objects below the prefix go; neighbours stay."""
    for key in ("run/a/1", "run/a/b/2", "run/ab/3"):
        bucket.put(key, "x")
    storage.delete_folder(f"s3://{bucket.name}/run/a")
    assert bucket.stored() == ["run/ab/3"]


def expect(error: type[TrainerError], storage: Storage, uri: str) -> str:
    """Read from a place that does not work, and return the message."""
    with pytest.raises(error) as caught:
        storage.stat(uri)
    return str(caught.value)


def test_a_missing_bucket_is_named(storage: Storage) -> None:
    """A bucket that is not there is the user's mistake, told at once, for a file and for a folder."""
    message = expect(MissingBucket, storage, "s3://not-there/train.jsonl")
    assert message.startswith("s3://not-there/train.jsonl: there is no bucket 'not-there' at http://127.0.0.1:")
    with pytest.raises(MissingBucket, match="not-there"):
        storage.listing("s3://not-there/base")


def test_a_missing_file_is_named(storage: Storage, bucket: Bucket) -> None:
    """An object that is not there is named by its whole URI."""
    uri = f"s3://{bucket.name}/train.jsonl"
    assert expect(MissingFile, storage, uri) == f"{uri}: no such object"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_ACCESS_KEY_ID", "somebodyelse", "does not know the access key in AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "not-the-secret", "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_wrong_credential_is_named(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """A wrong key is refused at once; the message names the Secret and the variable, never what is in it."""
    monkeypatch.setenv(variable, value)
    started = time.monotonic()
    text = expect(AccessDenied, make_storage(bucket.server.endpoint), f"s3://{bucket.name}/a")
    assert message in text
    assert "Secret 's3-credentials'" in text
    assert value not in text
    assert bucket.server.secret_key not in text
    assert time.monotonic() - started < 3


def test_missing_credentials_are_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without any credentials the message says which variables the Secret needs."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = expect(AccessDenied, make_storage(bucket.server.endpoint), f"s3://{bucket.name}/a")
    assert "create a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in text


def closed_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("kind", ["refused", "unknown name", "web page", "no path", "plain text on 200"])
def test_a_wrong_endpoint_is_named(bucket: Bucket, impatient: None, kind: str) -> None:
    """At first contact a service that does not answer as S3 is a wrong address, not an outage."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if "200" in kind else 404 if kind == "no path" else 403)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html><body>Welcome<br></body></html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    endpoints = {"refused": f"http://127.0.0.1:{closed_port()}", "unknown name": "http://minio.nowhere.invalid:9000"}
    endpoint = endpoints.get(kind, f"http://127.0.0.1:{web.server_port}")
    try:
        with pytest.raises(EndpointUnreachable) as caught:
            make_storage(endpoint).listing(f"s3://{bucket.name}/base")
        with pytest.raises(EndpointUnreachable):
            make_storage(endpoint).stat(f"s3://{bucket.name}/a")
    finally:
        web.shutdown()
        web.server_close()
    assert str(caught.value).startswith(f"no S3 service answers at {endpoint} (storage.endpoint): ")


def test_a_malformed_endpoint_is_a_configuration_error() -> None:
    """A thing that is no URL fails without any contact."""
    with pytest.raises(InvalidConfiguration, match=r"storage\.endpoint 'minio:9000'"):
        make_storage("minio:9000").stat("s3://bucket/key")


FAULTS = [["503"] * 5, ["500", "drop", "503", "drop"], ["drop"] * 4]


@pytest.mark.parametrize("faults", FAULTS, ids=["503", "mixed", "drop"])
def test_a_disturbance_is_waited_out(bucket: Bucket, proxy: Proxy, tmp_path: Path, faults: list[str]) -> None:
    """Errors of the service and lost connections only delay, for reading and for writing."""
    storage = make_storage(proxy.endpoint)
    uri = f"s3://{bucket.name}/a"
    (tmp_path / "source").write_bytes(b"content")
    assert storage.listing(f"s3://{bucket.name}") == []
    for act in (
        lambda: storage.upload(tmp_path / "source", uri),
        lambda: fetch(storage, bucket, "a", tmp_path / "target"),
        lambda: storage.put(uri, b"content", replaces="*"),
        lambda: storage.listing(f"s3://{bucket.name}"),
    ):
        proxy.faults = deque(faults)
        act()
        assert not proxy.faults
    assert (tmp_path / "target").read_bytes() == b"content"


def test_a_truncated_download_is_fetched_again(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    """A body that ends early is noticed, and only its part comes again."""
    content = os.urandom(PART_BYTES + 1000)
    bucket.put("big", content)
    sizes: list[int] = []
    storage = make_storage(proxy.endpoint)
    file = storage.stat(f"s3://{bucket.name}/big")
    proxy.faults = deque(["truncate", "truncate", "truncate"])
    storage.download([(f"s3://{bucket.name}/big", file, tmp_path / "big")], sizes.append)
    assert (tmp_path / "big").read_bytes() == content
    assert sum(sizes) == len(content)


def test_a_flipped_bit_is_repaired(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    """A download whose MD5 is not the ETag is made again."""
    bucket.put("a", b"content")
    storage = make_storage(proxy.endpoint)
    file = storage.stat(f"s3://{bucket.name}/a")
    proxy.faults = deque(["flip"])
    storage.download([(f"s3://{bucket.name}/a", file, tmp_path / "a")])
    assert (tmp_path / "a").read_bytes() == b"content"


def test_an_etag_that_is_no_md5_is_accepted(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    """Encrypted objects have other ETags: two equal downloads are believed."""
    bucket.put("a", b"content")
    storage = make_storage(proxy.endpoint)
    file = storage.stat(f"s3://{bucket.name}/a")
    proxy.always = "flip"  # always the same wrong bit, so the bytes are stable and only the MD5 differs
    storage.download([(f"s3://{bucket.name}/a", file, tmp_path / "a")])
    assert (tmp_path / "a").read_bytes() == b"contenu"


def test_an_object_that_changes_while_it_is_read(bucket: Bucket, storage: Storage, tmp_path: Path) -> None:
    """Parts of two versions are never mixed."""
    bucket.put("a", "old")
    file = storage.stat(f"s3://{bucket.name}/a")
    bucket.put("a", "new")
    with pytest.raises(StorageUnavailable, match="the object changed while it was read"):
        storage.download([(f"s3://{bucket.name}/a", file, tmp_path / "a")])


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_an_outage_that_lasts_is_told(bucket: Bucket, proxy: Proxy, impatient: None, fault: str) -> None:
    """After the service has answered once, silence is an outage: retried by a new attempt, not the user's mistake."""
    storage = make_storage(proxy.endpoint)
    storage.listing(f"s3://{bucket.name}")
    proxy.always = fault
    with pytest.raises(StorageUnavailable) as caught:
        storage.stat(f"s3://{bucket.name}/a")
    assert "did not serve the request, all retries included" in str(caught.value)
    assert str(caught.value).startswith(f"s3://{bucket.name}/a: {proxy.endpoint} ")


def test_an_overloaded_service_at_first_contact_is_an_outage(bucket: Bucket, proxy: Proxy, impatient: None) -> None:
    """503 is an answer: the address is right."""
    proxy.always = "503"
    with pytest.raises(StorageUnavailable, match="503"):
        make_storage(proxy.endpoint).stat(f"s3://{bucket.name}/a")


def test_a_lost_answer_to_a_put_is_no_other_writer(bucket: Bucket, proxy: Proxy) -> None:
    """A put that went through but whose answer got lost is refused the second time; the caller compares contents."""
    storage = make_storage(proxy.endpoint)
    uri = f"s3://{bucket.name}/manifest.json"
    assert storage.put(uri, b"mine", replaces=None)
    assert not storage.put(uri, b"mine", replaces=None)
    assert storage.read(uri, 10) == (b"mine", storage.stat(uri).version)


def test_a_stop_ends_a_wait(bucket: Bucket, proxy: Proxy) -> None:
    """SIGTERM during an outage does not wait for the outage."""
    stop = Stop()
    storage = Storage(make_storage(proxy.endpoint).settings, stop=stop)
    proxy.always = "503"
    threading.Timer(0.5, stop.request, args=("SIGTERM",)).start()
    started = time.monotonic()
    with pytest.raises(Preempted):
        storage.stat(f"s3://{bucket.name}/a")
    assert time.monotonic() - started < 3
