"""A merge pod that is killed at any moment leaves no manifest that does not verify, and a retry completes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.s3_proxy import Proxy, proxied
from tests.trainer.kit import Bucket
from tests.trainer.merge_run_kit import merge_run, publish_adapter, upload_folder, write_adapter
from tests.trainer.s3_fixtures import bucket, server, shared_bucket, storage
from tunewright_trainer.artifact import download_artifact
from tunewright_trainer.storage import Storage

__all__ = ["bucket", "server", "shared_bucket", "storage"]

BASE = "s3://tests/base"
ADAPTERS = "s3://tests/adapters"
OUT = "s3://tests/out"
SEED = 20_261_129
EARLY_KILLS = 16
"""While inputs are looked up and fetched, while the model is merged, and while it is read back."""
EARLY_REQUESTS = 60
MERGED = "merged: 6 tensors changed"
"""In the log, a moment before the process that compares logits starts."""
LATE = ("/run.json", "/manifest.json", "/latest.json")
"""What is stored last: killed at the moment of these requests."""


class Pod:
    """The container's command, as a process of this machine."""

    def __init__(self, bucket: Bucket, proxy: Proxy, work: Path, number: int) -> None:
        document = merge_run(proxy.endpoint, adapters=[{"uri": ADAPTERS}], output={"uri": OUT})
        self.log = work / f"{number}.log"
        environment = {
            **os.environ,
            **bucket.environment,
            "TUNEWRIGHT_RUN": document.to_json(),
            "TUNEWRIGHT_WRITER": f"{number:08x}",
            "TUNEWRIGHT_WORK": str(work / "work"),
            "TUNEWRIGHT_TERMINATION_LOG": str(work / "termination"),
            "TUNEWRIGHT_PORT": "0",
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunewright_trainer"], env=environment, stdout=output, stderr=output
            )

    def kill_when(self, moment: Callable[[], bool]) -> bool:
        """Kill it at a moment; tell whether it was still there then."""
        while not moment():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        self.process.kill()
        self.process.wait()
        return True


def assert_valid_or_absent(bucket: Bucket, storage: Storage, folder: Path) -> None:
    """Every byte that a manifest names is there and right, and there is one manifest at most."""
    manifests = [key for key in bucket.stored("out") if key.endswith("/manifest.json")]
    assert len(manifests) <= 1
    for key in manifests:
        download_artifact(f"s3://{bucket.name}/{key}", folder, storage)
        shutil.rmtree(folder)


def asked(proxy: Proxy, count: int) -> Callable[[], bool]:
    """Return the moment of a number of requests."""
    return lambda: len(proxy.requests) >= count


def put(proxy: Proxy, name: str) -> Callable[[], bool]:
    """Return the moment of the request that stores a file."""
    return lambda: any(line.startswith("PUT") and name in line for line in proxy.requests)


def said(log: Path, text: str, delay: float) -> Callable[[], bool]:
    """Return the moment some seconds after the log had a text."""
    seen: list[float] = []

    def moment() -> bool:
        if not seen and text in log.read_text():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] > delay

    return moment


@pytest.mark.timeout(600)
def test_killed_at_twenty_moments(bucket: Bucket, storage: Storage, tiny: Path, tmp_path: Path) -> None:
    """SIGKILL anywhere: no manifest that does not verify, no process left, and the last attempt has a result."""
    draw = random.Random(SEED)
    upload_folder(bucket, tiny, "base")
    publish_adapter(storage, ADAPTERS, write_adapter(tmp_path / "adapter", BASE), BASE)
    (tmp_path / "pod").mkdir()
    killed, where = 0, []
    with proxied(bucket.server) as proxy:
        for number in range(EARLY_KILLS + 1 + len(LATE)):
            proxy.requests.clear()
            pod = Pod(bucket, proxy, tmp_path / "pod", number)
            if number < EARLY_KILLS:
                moment = asked(proxy, draw.randint(1, EARLY_REQUESTS))
            elif number == EARLY_KILLS:
                moment = said(pod.log, MERGED, draw.uniform(1.5, 4))
            else:
                moment = put(proxy, LATE[number - EARLY_KILLS - 1])
            if pod.kill_when(moment):
                killed += 1
            else:
                assert pod.process.returncode == 0, pod.log.read_text()
            where.append(len(proxy.requests))
            assert_valid_or_absent(bucket, storage, tmp_path / "download")
        last = Pod(bucket, proxy, tmp_path / "pod", 99)
        assert last.process.wait() == 0, last.log.read_text()
    assert killed >= EARLY_KILLS + 2, where
    manifest = download_artifact(OUT, tmp_path / "download", storage)
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    own = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert own == []
