"""A cluster with the operator installed and an S3 server with a base model: shared by the e2e tests and the demo."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import yaml
from botocore.config import Config

from tests.cluster import Cluster, model, paths, provider

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts" / "tunewright"
OPERATOR_NAMESPACE = "tunewright-system"
SECRET_NAME = "s3-credentials"
MODELS, DATASETS = "models", "datasets"
SMOLLM2, TINY = "smollm2-135m-instruct", "tiny-llama"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Platform:
    """What a platform team would run: a cluster, an S3 service, the operator from its chart."""

    cluster: Cluster
    endpoint: str
    """S3 address that pods and this machine reach."""
    access_key: str
    secret_key: str

    def run(self, *command: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command against the cluster; its output is in the error when it fails."""
        environment = {**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig), **self.s3_environment()}
        result = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, check=False)
        if check and result.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)} exited with {result.returncode}:\n{result.stdout}{result.stderr}"
            )
        return result

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl and return what it prints."""
        return self.run(str(self.cluster.kubectl), *arguments, stdin=stdin, check=check).stdout

    def apply(self, namespace: str, *documents: Mapping[str, Any]) -> None:
        """Apply documents with kubectl, as a user would."""
        self.kubectl("apply", "-n", namespace, "-f", "-", stdin=yaml.safe_dump_all(documents))

    def get(self, kind: str, name: str, namespace: str) -> dict[str, Any]:
        """Return an object."""
        document: dict[str, Any] = json.loads(self.kubectl("get", kind, name, "-n", namespace, "-o", "json"))
        return document

    def s3_environment(self) -> dict[str, str]:
        """Return the variables by which AWS clients find the S3 server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def s3(self) -> S3Client:
        """Return a client of the S3 server."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def keys(self, bucket: str, prefix: str) -> list[str]:
        """Return the keys below a prefix."""
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def add_namespace(self, name: str) -> None:
        """Make a namespace that enforces the restricted Pod Security Standard, with the S3 credentials in it."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply(
            "default",
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}},
        )
        secret = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        self.apply(
            name, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET_NAME}, "stringData": secret}
        )


def bring_up(say: Say) -> Platform:
    """Start (or find) a cluster with S3 server, models, data sets and the installed operator."""
    say("a cluster, and the images of operator and trainer")
    provided = provider.provide()
    running = provided.cluster
    assert running.s3 is not None, "every provider brings an S3 server"
    platform = Platform(running, running.s3.endpoint, running.s3.access_key, running.s3.secret_key)
    say("S3: base models and data sets")
    fill_buckets(platform)
    say("helm: charts/tunewright")
    install_operator(platform, provided.operator_image, provided.trainer_image)
    return platform


def fill_buckets(platform: Platform) -> None:
    """Put the base models and the example data where the examples expect them; what is there already stays."""
    client = platform.s3()
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in {MODELS, DATASETS} - present:
        client.create_bucket(Bucket=bucket)
    folders = {SMOLLM2: model.smollm2(paths.cache() / SMOLLM2), TINY: model.tiny_llama(paths.cache() / TINY)}
    for name, folder in folders.items():
        upload_folder(platform, folder, MODELS, name)
    for key, source in example_data().items():
        client.upload_file(str(source), DATASETS, key)


def example_data() -> dict[str, Path]:
    """Return the files of the example data sets by the key that the examples read them from."""
    folder = ROOT / "examples" / "data"
    return {f"docstrings/{path.name.removeprefix('docstrings-')}": path for path in sorted(folder.glob("*.jsonl"))}


def upload_folder(platform: Platform, folder: Path, bucket: str, prefix: str) -> None:
    """Upload the files of a folder that are not there in the same size."""
    client = platform.s3()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    sizes = {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        key = f"{prefix}/{file.name}"
        if sizes.get(key) != file.stat().st_size:
            client.upload_file(str(file), bucket, key)


def install_operator(platform: Platform, operator_image: str, trainer_image: str, *further: str) -> None:
    """Install or upgrade the chart and wait until the operator is ready."""
    operator_repository, operator_tag = operator_image.rsplit(":", 1)
    trainer_repository, trainer_tag = trainer_image.rsplit(":", 1)
    settings = {
        "image.repository": operator_repository,
        "image.tag": operator_tag,
        "trainer.image.repository": trainer_repository,
        "trainer.image.tag": trainer_tag,
        "storage.endpoint": platform.endpoint,
        "storage.pathStyle": "true",
        # Given up soon: a node that is lost here was stopped by a test.
        "settings.nodeLostGraceSeconds": "5",
    }
    values = [
        part
        for key, value in settings.items()
        for part in ("--set-string" if key.endswith("tag") else "--set", f"{key}={value}")
    ]
    platform.run(
        str(platform.cluster.helm), "upgrade", "--install", "tunewright", str(CHART),
        "--namespace", OPERATOR_NAMESPACE, "--create-namespace", "--wait", "--timeout", "180s", *values, *further,
    )  # fmt: skip
