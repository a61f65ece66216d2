"""The code of reward functions: part of the run key, and looked for before anything is fetched."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.kit import MODEL_FILES, make_run, make_settings
from tunewright_api.run_report import RunReport
from tunewright_trainer import supervisor
from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.reward_code import digest_of

CODE = "def score(prompts, completions, columns):\n    return [1.0] * len(prompts)\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package `ownrewards` with a module and a file that it reads."""
    folder = tmp_path / "code" / "ownrewards"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the supervisor imports nothing')\n")
    (folder / "deep" / "scores.py").write_text(CODE)
    (folder / "cases.json").write_text("[]")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def digest() -> str:
    """Return the digest of the package's function."""
    importlib.invalidate_caches()
    return digest_of("ownrewards.deep.scores:score", "rewards[0].function")


def test_every_file_of_the_package_counts(package: Path) -> None:
    """Code and what lies beside it, but nothing that Python itself writes."""
    first = digest()
    assert first == digest()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "scores.pyc").write_bytes(b"bytes")
    assert digest() == first
    seen = {first}
    for name in ("deep/scores.py", "cases.json", "new.py"):
        with (package / name).open("a") as file:
            file.write("\n")
        seen.add(digest())
    assert len(seen) == 4


def test_a_single_module_counts_alone(package: Path) -> None:
    """A module beside others is known by its own file."""
    (package.parent / "alone.py").write_text(CODE)
    importlib.invalidate_caches()
    first = digest_of("alone:score", "f")
    (package / "new.py").write_text("")
    assert digest_of("alone:score", "f") == first
    (package.parent / "alone.py").write_text(CODE + "\n")
    assert digest_of("alone:score", "f") != first


@pytest.mark.parametrize("name", ["nowhere.to.be.found:score", "__main__:score"])
def test_a_package_that_is_not_there(name: str) -> None:
    """The message names the function and where its module belongs."""
    with pytest.raises(InvalidConfiguration, match=rf"^rewards\[0\].function {name}: there is no module .*pod\.image"):
        digest_of(name, "rewards[0].function")


def carry_out(folder: Path, module: str) -> RunReport:
    """Run on prompts with a worker that only plays training."""
    if not (folder / "base").exists():  # rewritten files would be another version
        (folder / "base").mkdir()
        for name, content in MODEL_FILES.items():
            (folder / "base" / name).write_bytes(content)
        (folder / "train.jsonl").write_text(json.dumps({"prompt": "Q"}) + "\n")
    given: dict[str, Any] = {
        "model": {"uri": f"{folder}/base"},
        "dataset": {"train": [{"uri": f"{folder}/train.jsonl"}]},
        "objective": {
            "type": "GRPO", "grpo": {"rewards": [{"type": "Function", "function": {"module": module}}]}
        },
        "output": {"uri": f"{folder}/out"},
    }  # fmt: skip
    return supervisor.run(make_run(None, local=True, **given), make_settings(folder / "work", local=True))


def test_another_function_makes_another_run(package: Path, tmp_path: Path) -> None:
    """The same code is found again, other code under the same name is trained with; run.json names it."""
    name = "ownrewards.deep.scores:score"
    first = carry_out(tmp_path, name)
    assert first.exit_code == 0, first.message
    (document,) = (tmp_path / "out").glob("*/*/run.json")
    assert json.loads(document.read_text())["inputs"]["rewardFunctions"] == [{"module": name, "digest": digest()}]
    assert carry_out(tmp_path, name).cached
    (package / "deep" / "scores.py").write_text(CODE + "\n")
    again = carry_out(tmp_path, name)
    assert (again.cached, again.run_key == first.run_key) == (False, False)


def test_nothing_is_fetched_for_a_function_that_is_not_there(tmp_path: Path) -> None:
    """The report comes in seconds."""
    report = carry_out(tmp_path, "nowhere:score")
    assert (report.exit_code, report.reason) == (20, "InvalidConfiguration")
    assert "there is no module nowhere in this image" in (report.message or "")
    assert not (tmp_path / "work" / "data").exists()
