"""Every example is valid, and the data set is what its script makes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import yaml

from tunewright_api.v1alpha1.method import MethodType
from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_api.validation import parse_adaptermerge, parse_finetunejob
from tunewright_cli.kubectl_yaml import read_documents

EXAMPLES = Path(__file__).parents[2] / "examples"
MERGES = sorted(path.name for path in EXAMPLES.glob("merge-*.yaml"))
JOBS = sorted(path.name for path in EXAMPLES.glob("*.yaml") if path.name not in ("secret.yaml", *MERGES))


def load(name: str) -> ModuleType:
    """Import the script that makes the data set."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / "data" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(part: str) -> list[dict[str, str]]:
    """Return the committed rows of a part."""
    text = (EXAMPLES / "data" / f"docstrings-{part}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_method_and_objective_has_an_example() -> None:
    """What the API offers can be seen in a file."""
    documents = [document for name in JOBS for document in read_documents((EXAMPLES / name).read_text(), name)]
    specs = [parse_finetunejob(document.content).spec for document in documents]
    assert {spec.method.type for spec in specs} == set(get_args(MethodType))
    assert {spec.objective.type if spec.objective else "SFT" for spec in specs} == set(get_args(ObjectiveType))


@pytest.mark.parametrize("name", JOBS)
def test_every_example_is_valid(name: str) -> None:
    """As the API server would judge it."""
    (document,) = read_documents((EXAMPLES / name).read_text(), name)
    parse_finetunejob(document.content)


@pytest.mark.parametrize("name", MERGES)
def test_every_merge_is_valid(name: str) -> None:
    """As the API server would judge it, and small enough for any node."""
    (document,) = read_documents((EXAMPLES / name).read_text(), name)
    spec = parse_adaptermerge(document.content).spec
    assert spec.resources is not None
    assert spec.resources.memory == "3Gi"


@pytest.mark.parametrize("name", [name for name in JOBS if name != "quickstart-gpu.yaml"])
def test_the_runnable_examples_need_no_gpu_and_little_time(name: str) -> None:
    """CPU, bounded memory, at most 30 steps of 8 short rows."""
    (document,) = read_documents((EXAMPLES / name).read_text(), name)
    spec = parse_finetunejob(document.content).spec
    assert spec.resources is not None
    assert spec.hyperparameters is not None
    assert spec.resources.gpus == 0
    assert spec.resources.memory is not None
    assert spec.hyperparameters.max_steps is not None
    assert spec.hyperparameters.max_steps <= 30
    assert spec.hyperparameters.batch_size is not None
    assert spec.hyperparameters.batch_size <= 8
    assert spec.hyperparameters.max_sequence_length == 128


def test_the_secret_holds_no_secret() -> None:
    """A template with the keys that the trainer reads."""
    secret = yaml.safe_load((EXAMPLES / "secret.yaml").read_text())
    assert secret["metadata"]["name"] == "s3-credentials"
    assert secret["stringData"] == {"AWS_ACCESS_KEY_ID": "REPLACE-ME", "AWS_SECRET_ACCESS_KEY": "REPLACE-ME"}


@pytest.mark.parametrize(("part", "count"), [("train", 270), ("validation", 30)])
def test_the_rows_are_questions_with_one_sentence_answers(part: str, count: int) -> None:
    """Nothing is empty, cut off, or marked up."""
    found = rows(part)
    assert len(found) == count
    for row in found:
        assert set(row) == {"prompt", "completion"}
        assert re.fullmatch(r"What does [a-z][\w.]+ do\?", row["prompt"], re.IGNORECASE)
        assert re.fullmatch(r"[A-Z][^.`*<>]+\.", row["completion"])


def test_no_validation_row_was_trained_on() -> None:
    """Neither a question nor an answer stands in both parts."""
    for column in ("prompt", "completion"):
        train, validation = ({row[column] for row in rows(part)} for part in ("train", "validation"))
        assert not train & validation


def test_the_script_makes_the_same_rows_every_time(tmp_path: Path) -> None:
    """Two runs on one Python write the same bytes, in the committed form."""
    script = load("make_docstrings")
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        script.write(tmp_path / folder)
    for part, count in (("train", 270), ("validation", 30)):
        first, second = (
            (tmp_path / folder / f"docstrings-{part}.jsonl").read_bytes() for folder in ("first", "second")
        )
        assert first == second
        made = [json.loads(line) for line in first.splitlines()]
        assert len(made) == count
        assert all(set(row) == {"prompt", "completion"} for row in made)


def test_judged_rows_are_those_of_their_script(tmp_path: Path) -> None:
    """Preferences and labels follow from the questions and answers."""
    load("make_judged").write(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == [f"{name}-{part}.jsonl" for name in ("labelled", "preference") for part in ("train", "validation")]
    for name in made:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()
