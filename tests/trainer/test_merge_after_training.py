"""output.merge: the training's own supervisor publishes the merged weights beside the adapter, in one manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.trainer.kit import ROWS, WRITER, Bucket, bucket_run, make_settings
from tests.trainer.merge_run_kit import adapter_tensors, upload_folder, write_adapter
from tests.trainer.s3_fixtures import bucket, server, shared_bucket
from tunewright_api.run_report import RunReport
from tunewright_cli.main import app
from tunewright_trainer import supervisor

__all__ = ["bucket", "server", "shared_bucket"]

BASE = "s3://tests/base"


@pytest.fixture
def inputs(bucket: Bucket, tiny: Path) -> Bucket:
    """A bucket with the tiny Llama and training rows."""
    upload_folder(bucket, tiny, "base")
    bucket.put("train.jsonl", ROWS)
    return bucket


def train(bucket: Bucket, work: Path, adapter: Path, writer: str = WRITER, **merge: Any) -> RunReport:
    """Run a training whose worker gives an adapter that is there already."""
    environment = {**bucket.environment, "FAKE_ADAPTER": str(adapter), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["TUNEWRIGHT_GGUF_TOOLS"] = "/nonexistent"
    settings = make_settings(work, environment=environment, writer=writer)
    output = {"uri": "s3://tests/out", **({"merge": merge} if merge else {})}
    return supervisor.run(bucket_run(bucket, output=output), settings)


def test_adapter_and_merged_model(inputs: Bucket, tiny: Path, tmp_path: Path) -> None:
    """One manifest has both; the root stays the adapter, the status says where the model is, and verify proves it."""
    adapter = write_adapter(tmp_path / "adapter", BASE)
    report = train(inputs, tmp_path / "work", adapter, dtype="Float32", maxShardSize="500MB")
    assert (report.exit_code, report.reason) == (0, "Succeeded"), report.message
    own = f"out/{report.run_key}/{WRITER}"
    assert report.output is not None
    assert report.output.uri == f"s3://tests/{own}/adapter"
    assert report.output.merged_uri == f"s3://tests/{own}/merged"
    manifest = inputs.json(f"out/{report.run_key}/manifest.json")
    assert (manifest["kind"], manifest["root"]) == ("Adapter", f"{WRITER}/adapter")
    assert manifest["verification"]["changedTensors"] == 6
    assert manifest["metrics"]["steps"] == 10
    assert report.verification is not None
    assert report.verification.document() == manifest["verification"]
    inputs.client.download_file("tests", f"{own}/merged/model.safetensors", str(tmp_path / "merged.safetensors"))
    name, factors = "model.layers.0.self_attn.q_proj", adapter_tensors(1)
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = load_file(tiny / "model.safetensors")[f"{name}.weight"] + 2 * (b @ a)
    merged = load_file(tmp_path / "merged.safetensors")[f"{name}.weight"]
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-7)
    card = inputs.client.get_object(Bucket="tests", Key=f"{own}/merged/README.md")["Body"].read().decode()
    assert "A fine-tuned copy of `s3://tests/base`" in card
    checked = CliRunner().invoke(
        app, ["verify", "s3://tests/out", "--endpoint", inputs.server.endpoint], env=inputs.environment
    )
    assert checked.exit_code == 0, checked.output
    for line in ("files     passed", "adapter   passed  LORA, 12 tensors", "weights   passed"):
        assert line in checked.output
    again = train(inputs, tmp_path / "again", adapter, "bbbbbbbb", dtype="Float32", maxShardSize="500MB")
    assert (again.reason, again.output, again.verification) == ("Cached", report.output, report.verification)


def test_an_adapter_outlives_a_merge_that_fails(inputs: Bucket, tmp_path: Path) -> None:
    """The run fails for the merge's reason; the adapter is not lost: the same run without the merge finds it."""
    zeros = {name: np.zeros_like(t) if "lora_B" in name else t for name, t in adapter_tensors(1).items()}
    adapter = write_adapter(tmp_path / "adapter", BASE, tensors=zeros)
    failed = train(inputs, tmp_path / "work", adapter, dtype="BFloat16")
    assert (failed.exit_code, failed.reason) == (20, "VerificationFailed")
    assert "the merged model would be identical to the base of the trained adapter" in failed.message
    assert inputs.stored(f"out/{failed.run_key}/") == []
    alone = train(inputs, tmp_path / "alone", adapter, "bbbbbbbb")
    assert (alone.exit_code, alone.reason) == (0, "Cached")
    assert alone.output is not None
    assert f"The adapter itself is published at {alone.output.uri}: " in failed.message
    assert (alone.output.merged_uri, alone.verification) == (None, None)


def test_gguf_without_tools_is_told_before_training(inputs: Bucket, tmp_path: Path) -> None:
    """Seconds, not GPU hours."""
    adapter = write_adapter(tmp_path / "adapter", BASE)
    report = train(inputs, tmp_path / "work", adapter, gguf=["Q8_0"])
    assert (report.exit_code, report.reason, report.step) == (20, "InvalidConfiguration", 0)
    assert "export.gguf needs llama.cpp's tools" in report.message
