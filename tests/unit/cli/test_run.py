"""`tunewright run`: what the supervisor is given, and how its report comes out. Real training is in tests/trainer."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.cli.conftest import Run


def test_a_missing_model_is_reported_like_in_the_cluster(run: Run, job_file: Path, tmp_path: Path) -> None:
    """The supervisor's own message and exit code, within seconds, with the log kept."""
    work = tmp_path / "work"
    result = run("run", "-f", job_file, "--work", work)
    assert result.exit_code == 20
    assert f"{tmp_path}/model" in result.stderr
    assert list((work / "logs").iterdir())


def test_bad_rows_stop_the_run_before_training(run: Run, job_file: Path, rows: Path, tmp_path: Path) -> None:
    """File, line and field; JSON is the whole report."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows.write_text('{"prompt": "p"}\n{"prompt": "p"}\n')
    result = run("run", "-f", job_file, "--work", tmp_path / "work", "--output", "json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["exitCode"]) == (20, 20)
    assert report["reason"] in ("InvalidData", "InvalidModel")


def test_an_invalid_file_never_reaches_the_trainer(run: Run, job_file: Path, tmp_path: Path) -> None:
    """Checked first, with file, line and column."""
    job_file.write_text(job_file.read_text().replace("LoRA", "Lora"))
    result = run("run", "-f", job_file, "--work", tmp_path / "work")
    assert result.exit_code == 20
    assert f"{job_file}:7:12: spec.method.type" in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_reference_by_name_is_refused(run: Run, job_file: Path, tmp_path: Path) -> None:
    """Nobody can look it up here; the message says how to find the address."""
    model = f"{{uri: {tmp_path}/model, continueFrom: {{fineTuneJob: first}}}}"
    lines = job_file.read_text().splitlines()
    job_file.write_text("\n".join(f"  model: {model}" if line.startswith("  model:") else line for line in lines))
    result = run("run", "-f", job_file, "--work", tmp_path / "work")
    assert result.exit_code == 20
    assert "kubectl get ftj first -o jsonpath='{.status.output.manifestUri}'" in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_model_by_the_name_of_a_merge_is_refused(run: Run, job_file: Path, tmp_path: Path) -> None:
    """Likewise, with the way to the merged model's address."""
    lines = job_file.read_text().splitlines()
    job_file.write_text("\n".join("  model: {fromMerge: m}" if line.startswith("  model:") else line for line in lines))
    result = run("run", "-f", job_file, "--work", tmp_path / "work")
    assert result.exit_code == 20
    assert "kubectl get am m -o jsonpath='{.status.output.uri}'" in result.stderr


def test_several_nodes_are_refused(run: Run, job_file: Path, tmp_path: Path) -> None:
    """This machine is one; the message says how to train to the same result on it."""
    job_file.write_text(job_file.read_text().replace("{gpus: 0}", "{gpus: 0, nodes: 2}"))
    result = run("run", "-f", job_file, "--work", tmp_path / "work")
    assert result.exit_code == 20
    assert "local trains on 2 nodes, and a local run has only this machine: set resources.nodes to 1" in result.stderr
    assert not (tmp_path / "work").exists()
