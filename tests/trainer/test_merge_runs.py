"""Merges from document to report, against a real S3 server and real models, each proved by the real check of logits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.trainer.kit import WRITER, Bucket
from tests.trainer.merge_kit import (
    adapter_tensors,
    merge_run,
    merge_settings,
    publish_adapter,
    upload_folder,
    write_adapter,
)
from tests.trainer.s3_fixtures import bucket, make_storage, server, shared_bucket, storage
from tunewright_api.run_report import RunReport
from tunewright_trainer.merge import attempt
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.storage import Storage

__all__ = ["bucket", "server", "shared_bucket", "storage"]

BASE = "s3://tests/base"
OUT = "s3://tests/out"
ADAPTERS = "s3://tests/adapters"


@pytest.fixture
def inputs(bucket: Bucket, storage: Storage, tiny: Path, tmp_path: Path) -> Bucket:
    """A bucket with the tiny Llama and an adapter that was published for it."""
    upload_folder(bucket, tiny, "base")
    publish_adapter(storage, ADAPTERS, write_adapter(tmp_path / "adapter", BASE), BASE)
    return bucket


def run(bucket: Bucket, settings: SupervisorSettings, **spec: object) -> RunReport:
    """Merge on the inputs of a bucket."""
    given = {"adapters": [{"uri": ADAPTERS}], "output": {"uri": OUT}, **spec}
    return attempt.run(merge_run(bucket.server.endpoint, **given), settings)


def test_a_merge_is_published(inputs: Bucket, tmp_path: Path, tiny: Path) -> None:
    """The merged model lies in the run's folder with everything that was proved of it, and is base plus delta."""
    settings = merge_settings(tmp_path / "work", inputs, termination_log=tmp_path / "termination")
    report = run(inputs, settings, dtype="Float32")
    assert (report.exit_code, report.reason, report.stage) == (0, "Succeeded", "Finished"), report.message
    assert (tmp_path / "termination").read_text() == report.to_json()
    own = f"out/{report.run_key}/{WRITER}"
    assert report.output is not None
    assert report.output.uri == f"s3://tests/{own}/merged"
    manifest = inputs.json(f"out/{report.run_key}/manifest.json")
    assert (manifest["kind"], manifest["root"]) == ("Model", f"{WRITER}/merged")
    names = {f"{own}/{name}" for name in ("README.md", "run.json", "logs/attempt-1.log", "report.json")}
    names |= {f"{own}/merged/{name}" for name in ("README.md", *(path.name for path in tiny.iterdir()))}
    assert set(inputs.stored("out")) == {*names, f"out/{report.run_key}/manifest.json", "out/latest.json"}
    for file in manifest["files"]:
        body = inputs.client.get_object(Bucket="tests", Key=f"out/{report.run_key}/{file['path']}")["Body"].read()
        assert hashlib.sha256(body).hexdigest() == file["sha256"]
    verification = manifest["verification"]
    assert verification["passed"]
    assert (verification["adapterTensors"], verification["changedTensors"]) == (12, 6)
    assert verification["maxDivergence"] < verification["allowedDivergence"] < verification["effect"]
    assert report.verification is not None
    assert report.verification.document() == verification
    assert report.merge is not None
    assert (report.merge.base_uri, report.merge.changed_tensors) == (BASE, 6)
    inputs.client.download_file("tests", f"{own}/merged/model.safetensors", str(tmp_path / "merged.safetensors"))
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "merged.safetensors")
    factors = adapter_tensors(1)
    name = "model.layers.1.mlp.down_proj"
    delta = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * delta, rtol=1e-6, atol=1e-7)
    assert sum(not np.array_equal(before[key], after[key]) for key in before) == 6
    card = (inputs.client.get_object(Bucket="tests", Key=f"{own}/merged/README.md")["Body"].read()).decode()
    assert "12 tensors of the adapter, all of them used; 6 tensors of the model changed" in card
    document = inputs.json(f"{own}/run.json")
    assert document["inputs"]["model"] == {"uri": BASE, "version": report.merge.base_version}
    assert json.loads(report.to_json())["merge"]["adapters"][0]["uri"].endswith("/manifest.json")
