"""Fixtures of the end-to-end tests: one platform for all, and a way to write and await FineTuneJobs."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.platform import DATASETS, MODELS, SECRET_NAME, TINY, Platform, bring_up

NAMESPACE = "tunewright-e2e"
LABELS = {"ftj": "tunewright.dev/finetunejob", "am": "tunewright.dev/adaptermerge"}
Document = dict[str, Any]


def finetunejob(name: str, **changes: Any) -> Document:
    """Return a small FineTuneJob on the tiny model; `changes` replace parts of its spec, None removes one."""
    spec: Document = {
        "model": {"uri": f"s3://{MODELS}/{TINY}"},
        "dataset": {"train": [{"uri": f"s3://{DATASETS}/docstrings/train.jsonl", "maxSamples": 32}]},
        "method": {"type": "LoRA", "lora": {"rank": 4}},
        "hyperparameters": {"maxSteps": 4, "batchSize": 2, "gradientAccumulationSteps": 1, "maxSequenceLength": 64},
        "output": {"uri": f"s3://{MODELS}/e2e/{name}"},
        "storage": {"secretName": SECRET_NAME},
        "resources": {"gpus": 0, "cpu": "500m", "memory": "3Gi", "ephemeralStorage": "2Gi"},
        "retry": {"maxRestarts": 0},
    }
    for key, value in copy.deepcopy(changes).items():
        if value is None:
            spec.pop(key)
        else:
            spec[key] = value
    return {"apiVersion": "tunewright.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}


def adaptermerge(name: str, *adapters: Document, **changes: Any) -> Document:
    """Return an AdapterMerge; `changes` replace parts of its spec."""
    spec: Document = {
        "adapters": list(adapters),
        "output": {"uri": f"s3://{MODELS}/e2e/{name}"},
        "storage": {"secretName": SECRET_NAME},
        "resources": {"cpu": "500m", "memory": "3Gi", "ephemeralStorage": "2Gi"},
        "retry": {"maxRestarts": 0},
        **copy.deepcopy(changes),
    }
    return {"apiVersion": "tunewright.dev/v1alpha1", "kind": "AdapterMerge", "metadata": {"name": name}, "spec": spec}


@dataclass(frozen=True)
class Jobs:
    """Apply and await FineTuneJobs and, with `kind` am, AdapterMerges in the namespace of the tests."""

    platform: Platform
    namespace: str = NAMESPACE

    def apply(self, *documents: Document) -> None:
        """Apply documents with kubectl, in one go and in their order."""
        self.platform.apply(self.namespace, *documents)

    def status(self, name: str, kind: str = "ftj") -> Document:
        """Return the status of an object."""
        status: Document = self.platform.get(kind, name, self.namespace).get("status", {})
        return status

    def condition(self, name: str, kind: str) -> Document:
        """Return a condition of a FineTuneJob, empty before the first visit."""
        conditions = self.status(name).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def wait(self, name: str, until: Callable[[Document], object], timeout: float = 240, kind: str = "ftj") -> Document:
        """Wait until the status satisfies `until` and return it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            status = self.status(name, kind)
            if until(status):
                return status
            time.sleep(0.5)
        pods = self.platform.kubectl("describe", "pods", "-n", self.namespace, "-l", f"{LABELS[kind]}={name}")
        status = self.status(name, kind)
        raise AssertionError(f"{name} did not get there in {timeout} s; status {status}\n{pods[-3000:]}")

    def finished(self, name: str, timeout: float = 300, kind: str = "ftj") -> Document:
        """Wait for the end and return the status."""
        return self.wait(name, lambda s: s.get("phase") in ("Complete", "Failed"), timeout, kind)

    def pods(self, name: str) -> list[Document]:
        """Return the pods of a FineTuneJob."""
        documents = self.platform.kubectl(
            "get", "pods", "-n", self.namespace, "-l", f"tunewright.dev/finetunejob={name}", "-o", "json"
        )
        items: list[Document] = json.loads(documents)["items"]
        return items


@pytest.fixture(scope="session")
def platform() -> Platform:
    """Return the running platform; it stays up for the next test run, `make clean` removes it."""
    return bring_up(print)


@pytest.fixture(scope="session")
def jobs(platform: Platform) -> Iterator[Jobs]:
    """Give an empty namespace with the S3 credentials in it."""
    platform.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=true")
    client = platform.s3()
    for key in platform.keys(MODELS, "e2e/"):
        client.delete_object(Bucket=MODELS, Key=key)
    platform.add_namespace(NAMESPACE)
    yield Jobs(platform)
    platform.kubectl("delete", "ftj,am", "--all", "-n", NAMESPACE)
