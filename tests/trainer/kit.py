"""Builders for the tests of the supervisor: runs, settings, a small base model."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3

from tests.cluster.s3 import S3Server
from tunewright_api.run_config import StorageSettings, TrainRun, build_train_run
from tunewright_api.validation import parse_finetunejob
from tunewright_trainer.settings import SupervisorSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
WRITER = "0a1b2c3d"
ROWS = "".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) + "\n" for n in range(4))


def safetensors(size: int = 8) -> bytes:
    """Build a safetensors file with one tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": safetensors(100_000),
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
}


@dataclass
class Bucket:
    """A bucket of its own for one test, with inputs in it."""

    server: S3Server
    client: S3Client
    name: str

    def put(self, key: str, content: bytes | str) -> None:
        """Store an object."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def stored(self, prefix: str = "") -> list[str]:
        """Return all keys below a prefix."""
        return [o["Key"] for o in self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])]

    def json(self, key: str) -> Any:
        """Return a stored JSON document."""
        return json.loads(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def fill(self) -> None:
        """Store a base model and training rows."""
        for name, content in MODEL_FILES.items():
            self.put(f"base/{name}", content)
        self.put("train.jsonl", ROWS)

    @property
    def environment(self) -> dict[str, str]:
        """Credentials, as the pod gets them from the Secret."""
        return {"AWS_ACCESS_KEY_ID": self.server.access_key, "AWS_SECRET_ACCESS_KEY": self.server.secret_key}


def make_bucket(server: S3Server, name: str) -> Bucket:
    """Make a bucket on a server."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    client.create_bucket(Bucket=name)
    return Bucket(server, client, name)


def make_run(endpoint: str | None, *, local: bool = False, stall: str | None = None, **spec: Any) -> TrainRun:
    """Build a run document as the operator does; `spec` replaces parts of the spec."""
    document: dict[str, Any] = {
        "apiVersion": "tunewright.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support-bot"},
        "spec": {"method": {"type": "LoRA"}, "resources": {"gpus": 0}, **spec},
    }
    if stall is not None:
        document["spec"]["retry"] = {"timeouts": {"stall": stall}}
    parsed = parse_finetunejob(document, local=local)
    storage = StorageSettings(endpoint=endpoint, path_style=True, secret_name="s3-credentials")
    return build_train_run(parsed.spec, name="support-bot", namespace="ml", attempt=1, storage=storage)


def bucket_run(bucket: Bucket, *, endpoint: str | None = None, stall: str | None = None, **spec: Any) -> TrainRun:
    """Build a run on the inputs of a bucket."""
    given = {
        "model": {"uri": f"s3://{bucket.name}/base"},
        "dataset": {"train": [{"uri": f"s3://{bucket.name}/train.jsonl"}], "validationFraction": 0.25},
        "output": {"uri": f"s3://{bucket.name}/out"},
        **spec,
    }
    return make_run(endpoint or bucket.server.endpoint, stall=stall, **given)


def make_settings(work: Path, behaviour: str = "succeed", **changes: Any) -> SupervisorSettings:
    """Build settings with the fake worker."""
    environment = {"FAKE_WORKER": behaviour, "PATH": "/usr/bin:/bin", **changes.pop("environment", {})}
    given = {"work": work, "writer": WRITER, "echo": False, "worker_command": FAKE_WORKER, "environment": environment}
    return SupervisorSettings(**{**given, **changes})
