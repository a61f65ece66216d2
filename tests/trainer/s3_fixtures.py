"""Fixtures around one S3 server for all tests of a module; imported where they are needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.s3 import S3Server
from tests.trainer.kit import Bucket, make_bucket
from tunewright_api.run_config import StorageSettings
from tunewright_trainer.storage import Storage


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS server."""
    with S3Server.start(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def shared_bucket(server: S3Server) -> Bucket:
    """One bucket: SeaweedFS sets several volumes aside for each."""
    return make_bucket(server, "tests")


@pytest.fixture
def bucket(shared_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, with its credentials in the environment."""
    for key in shared_bucket.stored():
        shared_bucket.client.delete_object(Bucket=shared_bucket.name, Key=key)
    for variable, value in shared_bucket.environment.items():
        monkeypatch.setenv(variable, value)
    return shared_bucket


@pytest.fixture
def storage(bucket: Bucket) -> Storage:
    """Storage on the server; bucket and credentials are there."""
    return make_storage(bucket.server.endpoint)


def make_storage(endpoint: str | None) -> Storage:
    """Build storage on an endpoint."""
    return Storage(StorageSettings(endpoint=endpoint, path_style=True, secret_name="s3-credentials"))
