"""`tunewright run` and `get-adapter`: a whole local run, from local files to a verified adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunewright_cli.main import app

DOCSTRINGS = Path(__file__).parents[2] / "examples" / "data"


@pytest.mark.timeout(600)
def test_a_local_run_ends_with_an_adapter_that_verifies(tiny: Path, tmp_path: Path) -> None:
    """Trained, published, found again without training, downloaded."""
    job = tmp_path / "job.yaml"
    job.write_text(f"""\
apiVersion: tunewright.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: local}}
spec:
  model: {{uri: {tiny}}}
  dataset:
    train: [{{uri: {DOCSTRINGS}/docstrings-train.jsonl, maxSamples: 16}}]
    validation: [{{uri: {DOCSTRINGS}/docstrings-validation.jsonl, maxSamples: 4}}]
  method: {{type: LoRA, lora: {{rank: 4}}}}
  hyperparameters: {{maxSteps: 2, learningRate: 1e-2, maxSequenceLength: 64, gradientAccumulationSteps: 1}}
  output: {{uri: {tmp_path}/results}}
  resources: {{gpus: 0}}
""")
    runner = CliRunner()
    arguments = ["run", "-f", str(job), "--output", "json"]
    first = runner.invoke(app, arguments)
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert (report["reason"], report["step"]) == ("Succeeded", 2)
    assert report["evaluation"]["base"] > 0

    again = json.loads(runner.invoke(app, arguments).stdout)
    assert (again["reason"], again["output"]) == ("Cached", report["output"])

    fetched = runner.invoke(app, ["get-adapter", f"{tmp_path}/results", str(tmp_path / "adapter")])
    assert fetched.exit_code == 0, fetched.output
    assert report["output"]["digest"] in fetched.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
