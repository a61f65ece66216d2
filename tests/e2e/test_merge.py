"""Adapters are merged in pods: applied together with the runs that they wait for, verified, published, killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Jobs, adaptermerge, finetunejob
from tests.platform import MODELS

CLI = str(Path(sys.executable).parent / "tunewright")


def manifest(jobs: Jobs, status: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a published result."""
    bucket, key = status["output"]["manifestUri"].removeprefix("s3://").split("/", 1)
    document: dict[str, Any] = json.loads(jobs.platform.s3().get_object(Bucket=bucket, Key=key)["Body"].read())
    return document


@pytest.mark.timeout(900)
def test_merge_and_adapter_applied_together(jobs: Jobs) -> None:
    """Applied before the run that it waits for, a merge ends with a model that `tunewright verify` confirms."""
    jobs.apply(
        adaptermerge("together-merged", {"fineTuneJob": "together"}, export={"gguf": ["Q8_0"]}),
        finetunejob("together"),
    )
    waiting = jobs.wait("together-merged", lambda s: s.get("conditions"), kind="am")
    ready = next(c for c in waiting["conditions"] if c["type"] == "PodsReady")
    assert ready["reason"] == "WaitingForFineTuneJob", ready
    trained = jobs.finished("together")
    status = jobs.finished("together-merged", kind="am", timeout=600)
    assert status["phase"] == "Complete", status
    assert status["plan"]["adapters"][0]["uri"] == trained["output"]["manifestUri"]
    verification = status["verification"]
    assert verification["passed"]
    assert verification["maxDivergence"] <= verification["allowedDivergence"]
    written = manifest(jobs, status)
    assert written["verification"]["passed"]
    paths = [file["path"] for file in written["files"]]
    assert any(path.endswith("/merged/model.safetensors") for path in paths)
    assert [path for path in paths if path.endswith(".gguf")]
    assert len(status["output"]["ggufUris"]) == 1
    verified = jobs.platform.run(CLI, "verify", status["output"]["manifestUri"])
    assert verified.stdout.count("passed") == 2, verified.stdout


@pytest.mark.timeout(900)
def test_a_failed_run_fails_the_merge(jobs: Jobs) -> None:
    """A merge whose adapter cannot be trained ends with the reason of that, and never has a pod."""
    data = {"train": [{"uri": f"s3://{MODELS}/no/such.jsonl"}]}
    jobs.apply(finetunejob("no-data", dataset=data), adaptermerge("of-no-data", {"fineTuneJob": "no-data"}))
    status = jobs.finished("of-no-data", kind="am")
    assert status["phase"] == "Failed"
    assert status["failure"]["reason"] == "DependencyFailed"
    assert "no/such.jsonl" in status["failure"]["message"]
    assert "jobRef" not in status


@pytest.mark.timeout(900)
def test_a_killed_merge_goes_on(jobs: Jobs) -> None:
    """A merge pod that is deleted leaves no manifest; the next attempt publishes one that verifies."""
    jobs.apply(finetunejob("killed"))
    assert jobs.finished("killed")["phase"] == "Complete"
    jobs.apply(adaptermerge("killed-merged", {"fineTuneJob": "killed"}))
    jobs.wait("killed-merged", lambda s: s.get("phase") == "Running", kind="am")
    jobs.platform.kubectl(
        "delete", "pods", "-n", jobs.namespace, "-l", "tunewright.dev/adaptermerge=killed-merged", "--force",
        "--grace-period=0",
    )  # fmt: skip
    assert not [key for key in jobs.platform.keys(MODELS, "e2e/killed-merged/") if key.endswith("manifest.json")]
    status = jobs.finished("killed-merged", kind="am", timeout=600)
    assert status["phase"] == "Complete", status
    assert status["attempts"][0]["cause"] in ("PodDeleted", "Preempted", "NodeLost")
    jobs.platform.run(CLI, "verify", status["output"]["manifestUri"])
