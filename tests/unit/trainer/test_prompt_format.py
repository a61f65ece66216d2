"""Rows that only ask: what they become, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright_api.v1alpha1.parts import Dataset
from tunewright_trainer.data_formats import choose_format
from tunewright_trainer.dataset import BadRows, PreparedData, prepare
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.fields import BadField
from tunewright_trainer.transfer import Stop, ignore

ASK = {"role": "user", "content": "Q"}


def normalise(values: dict[str, Any]) -> dict[str, Any]:
    """Treat a row as the first and only one."""
    return choose_format("Auto", None, values, "f: line 1", "GRPO").normalise(values)


@pytest.mark.parametrize("prompt", ["Q", [ASK], [{"role": "system", "content": "S"}, ASK]])
def test_a_prompt_is_text_or_turns(prompt: object) -> None:
    """All other columns come along, whatever they hold."""
    row = normalise({"prompt": prompt, "answer": 4, "half": "\ud800", "list": [1, None]})
    assert row["prompt"] == prompt
    assert json.loads(row["columns"]) == {"answer": 4, "half": "\ud800", "list": [1, None]}
    row["columns"].encode()


def test_a_row_with_an_answer_is_a_prompt_too() -> None:
    """The objective decides: the completion is one of the further columns."""
    values = {"prompt": "Q", "completion": "A"}
    assert choose_format("Auto", None, values, "f: line 1", "GRPO").name == "Prompts"
    assert choose_format("Auto", None, values, "f: line 1", "SFT").name == "PromptCompletion"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "is empty"),
        (None, "must be a string"),
        ([], "is an empty list"),
        ([ASK, {"role": "assistant", "content": "A"}], "nothing to answer"),
    ],
)
def test_bad_prompts(prompt: object, message: str) -> None:
    """There must be something to answer."""
    with pytest.raises(BadField, match=message):
        normalise({"prompt": prompt})


def test_prompts_alone_teach_nothing_else() -> None:
    """Rows of prompts under another objective are named as what they are."""
    with pytest.raises(InvalidData, match="have format Prompts, which objective SFT cannot learn from"):
        choose_format("Auto", None, {"prompt": "Q"}, "f: line 1", "SFT")


def prepared(tmp_path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> PreparedData:
    """Prepare rows that rewards read columns of."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = Dataset.model_validate({"train": [{"uri": "s3://data/rows.jsonl"}]})
    return prepare(
        dataset,
        {"s3://data/rows.jsonl": {"s3://data/rows.jsonl": path}},
        tmp_path / "out",
        0,
        Stop(),
        ignore,
        "GRPO",
        columns,
    )


def test_columns_that_rewards_read_must_be_there(tmp_path: Path) -> None:
    """Every row without one is named, before anything is trained."""
    good = {"prompt": "Q", "answer": "4"}
    assert prepared(tmp_path, [good, {"prompt": "Q", "answer": 4}], ("answer",)).train_rows == 2
    bad: list[dict[str, Any]] = [good, {"prompt": "Q"}, {"prompt": "Q", "answer": None}, {"prompt": "Q", "answer": " "}]
    with pytest.raises(BadRows) as caught:
        prepared(tmp_path, bad, ("answer",))
    messages = "\n".join(caught.value.lines)
    assert "line 2: answer: is missing, but a reward of type ExactMatch reads it (exactMatch.column)" in messages
    assert "line 3: answer: must be text or a number to be compared with answers, is null" in messages
    assert "line 4: answer: is empty" in messages
