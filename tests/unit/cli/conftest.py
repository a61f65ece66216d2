"""Files and a runner for tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tunewright_cli.main import app

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Function that runs the command line with arguments, in an environment without AWS and kubeconfig."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def invoke(*arguments: str | Path, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return invoke


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file with 10 good rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(10)))
    return path


@pytest.fixture
def job_file(tmp_path: Path, rows: Path) -> Path:
    """A FineTuneJob on local paths: 8 rows to train on, 2 to evaluate on."""
    path = tmp_path / "job.yaml"
    path.write_text(f"""\
apiVersion: tunewright.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: local}}
spec:
  model: {{uri: {tmp_path}/model}}
  dataset: {{train: [{{uri: {rows}}}], validationFraction: 0.2}}
  method: {{type: LoRA}}
  hyperparameters: {{epochs: 3, batchSize: 2, gradientAccumulationSteps: 3}}
  output: {{uri: {tmp_path}/output}}
  resources: {{gpus: 0}}
""")
    return path
