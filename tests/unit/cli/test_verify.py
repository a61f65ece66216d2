"""`tunewright verify` on results that lie on this machine; merged models are verified in tests/trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.merge_run_kit import publish_adapter, write_adapter, write_base
from tests.unit.cli.conftest import Run
from tunewright_api.run_config import StorageSettings
from tunewright_trainer.storage import Storage

KEY = "ab" * 8


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """An output folder with a published adapter."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", str(base))
    publish_adapter(Storage(StorageSettings(), local=True), f"{tmp_path}/out", adapter, str(base), key=KEY)
    return tmp_path / "out"


def test_an_adapter_is_as_it_was_published(run: Run, result: Path) -> None:
    """Every file, and the adapter itself."""
    done = run("verify", result)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == f"manifest  {result}/{KEY}/manifest.json"
    assert "files     passed  3 files" in done.stdout
    assert "adapter   passed  LORA, 12 tensors, all of them finite" in done.stdout


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(run: Run, result: Path, damage: str) -> None:
    """One bit, a missing end, a missing file: exit code 1, and what is wrong."""
    file = result / KEY / "feedbeef/adapter/adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    if damage == "remove":
        file.unlink()
    done = run("verify", result, "--output", "json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["passed"]) == (1, False)
    (check,) = report["checks"]
    said = {
        "flip": "has the SHA-256",
        "cut": f"has {len(content) - 1} bytes, not {len(content)}",
        "remove": "is missing",
    }
    assert f"adapter_model.safetensors {said[damage]}" in check["detail"]


def test_only_the_files(run: Run, result: Path) -> None:
    """Nothing else is looked at then."""
    done = run("verify", result, "--files-only", "--output", "json")
    assert [check["name"] for check in json.loads(done.stdout)["checks"]] == ["files"]


def test_where_there_is_no_result(run: Run, tmp_path: Path) -> None:
    """The exit code of what is wrong, and one line."""
    done = run("verify", tmp_path)
    assert done.exit_code == 20
    assert done.stderr.startswith(f"error: {tmp_path}: no published result")
