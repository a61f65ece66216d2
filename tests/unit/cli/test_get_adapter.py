"""`tunewright get-adapter`, from results that the trainer's own code has published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Run
from tunewright_api.run_config import StorageSettings
from tunewright_trainer.publish import Published, Result, publish
from tunewright_trainer.storage import Storage

KEY = "0123456789abcdef"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Folder of results."""
    return tmp_path / "results"


@pytest.fixture
def published(tmp_path: Path, output: Path) -> Published:
    """A published adapter of two files, beside a log that is not part of it."""
    work = tmp_path / "work"
    files = {"adapter/adapter_config.json": "{}", "adapter/adapter_model.safetensors": "weights", "run.json": "{}"}
    paths = {}
    for name, text in files.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths[name] = path
    result = Result(KEY, "0a1b2c3d", "Adapter", "adapter", paths, {"steps": 3})
    made, _ = publish(Storage(StorageSettings(), local=True), str(output), result)
    return made


@pytest.mark.parametrize("below", ["", KEY, f"{KEY}/manifest.json", f"{KEY}/0a1b2c3d/adapter"])
def test_an_adapter_is_found_from_every_place(
    run: Run, output: Path, published: Published, below: str, tmp_path: Path
) -> None:
    """Output folder, run folder, manifest or adapter: the same files arrive."""
    target = tmp_path / "adapter"
    result = run("get-adapter", str(output / below), target)
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "weights",
    }
    assert "verified  size and SHA-256 of 2 files" in result.stdout
    assert published.output.digest in result.stdout


def test_json_for_scripts(run: Run, output: Path, published: Published, tmp_path: Path) -> None:
    """What was fetched, from where, and the numbers of the run."""
    result = run("get-adapter", output, tmp_path / "adapter", "--output", "json")
    report = json.loads(result.stdout)
    assert report["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert (report["kind"], report["runKey"], report["sizeBytes"]) == ("Adapter", KEY, 9)
    assert (report["digest"], report["metrics"]) == (published.output.digest, {"steps": 3})


@pytest.mark.parametrize("content", ["weightz", "weight"])
def test_a_changed_file_is_refused_and_nothing_is_left(
    run: Run, output: Path, published: Published, content: str, tmp_path: Path
) -> None:
    """Same size or not: what does not verify is not handed out."""
    target = tmp_path / "adapter"
    (output / KEY / "0a1b2c3d" / "adapter" / "adapter_model.safetensors").write_text(content)
    result = run("get-adapter", published.output.manifest_uri, target)
    assert result.exit_code == 1
    assert "adapter_model.safetensors" in result.stderr
    assert not target.exists()


def test_a_folder_with_files_is_left_alone(run: Run, output: Path, published: Published, tmp_path: Path) -> None:
    """Old and new files must not mix."""
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    result = run("get-adapter", output, target)
    assert (result.exit_code, "not an empty folder" in result.stderr) == (20, True)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_a_run_that_did_not_end_has_no_result(run: Run, output: Path, published: Published, tmp_path: Path) -> None:
    """Files without a manifest are nothing."""
    (output / KEY / "manifest.json").unlink()
    result = run("get-adapter", str(output / KEY), tmp_path / "adapter")
    assert (result.exit_code, "no published result" in result.stderr) == (20, True)


def test_a_manifest_that_points_elsewhere_is_refused(
    run: Run, output: Path, published: Published, tmp_path: Path
) -> None:
    """A bucket that others can write to must not write outside the target."""
    manifest = output / KEY / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0a1b2c3d/adapter/adapter_config.json", "../../outside.json"))
    result = run("get-adapter", str(manifest), tmp_path / "adapter")
    assert result.exit_code == 1
    assert "leaves the folder of the manifest" in result.stderr
    assert not (tmp_path / "adapter").exists()


def test_missing_s3_credentials_are_explained(run: Run, tmp_path: Path) -> None:
    """Exit code and words of an access problem, with the variables to set."""
    result = run("get-adapter", "s3://models/x", tmp_path / "adapter", "--endpoint", "http://127.0.0.1:1")
    assert result.exit_code == 21
    assert "AWS_" in result.stderr
