"""The S3 server of the benchmark, as its processes see it."""

from __future__ import annotations

import os

from tunewright_api.run_config import StorageSettings
from tunewright_trainer.storage import Storage

ENDPOINT = "BENCH_S3_ENDPOINT"
"""Environment variable with the server's address; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are its credentials."""


def storage() -> Storage:
    """Return storage on the server."""
    return Storage(StorageSettings(endpoint=os.environ[ENDPOINT], path_style=True, secret_name="s3-credentials"))
