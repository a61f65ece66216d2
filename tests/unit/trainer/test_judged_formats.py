"""Rows with judged answers and labels: what they become, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_api.v1alpha1.parts import Dataset
from tunewright_trainer.data_formats import choose_format
from tunewright_trainer.dataset import BadRows, PreparedData, prepare
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.fields import BadField
from tunewright_trainer.transfer import Stop, ignore

ASK = {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


def normalise(values: dict[str, Any], objective: ObjectiveType) -> dict[str, Any]:
    """Treat a row as the first and only one."""
    return choose_format("Auto", None, values, "f: line 1", objective).normalise(values)


PAIRS: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "text": ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, ("Q", "good", "bad")),
    "turns": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, ([ASK], [GOOD], [BAD])),
    "text prompt, turns": ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, ([ASK], [GOOD], [BAD])),
    "prompt in both chats": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ([ASK], [GOOD], [BAD])),
    "prompt repeated": ({"prompt": "Q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ([ASK], [GOOD], [BAD])),
    "prompt in both texts": ({"chosen": "Say it: well", "rejected": "Say it: woe"}, ("Say it:", " well", " woe")),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str) -> None:
    """Every way of writing a pair becomes a prompt and two answers."""
    values, (prompt, chosen, rejected) = PAIRS[case]
    assert normalise(values, "DPO") == {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert normalise(values, "Reward") == normalise(values, "DPO")


BAD_PAIRS: dict[str, tuple[dict[str, Any], str, str]] = {
    "equal": ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "rejected", "nothing to prefer"),
    "empty": ({"prompt": "Q", "chosen": " ", "rejected": "a"}, "chosen", "is empty"),
    "nothing in common": ({"chosen": "one", "rejected": "two"}, "chosen", "no prompt column"),
    "text and turns": ({"prompt": "Q", "chosen": "a", "rejected": [BAD]}, "rejected", "a list of turns, but chosen is"),
    "turns to text": ({"prompt": [ASK], "chosen": "a", "rejected": "b"}, "chosen", "text, but prompt is a list"),
    "different chats": (
        {"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]},
        "chosen",
        "differ only in their last turn",
    ),
    "answer of the user": ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, "chosen", "one assistant turn"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs(case: str) -> None:
    """A pair that cannot be learned from is refused by field."""
    values, field, message = BAD_PAIRS[case]
    with pytest.raises(BadField, match=message) as caught:
        normalise(values, "DPO")
    assert caught.value.field == field


@pytest.mark.parametrize(("label", "verdict"), [(True, True), (False, False), (1, True), (0, False), ("False", False)])
def test_judged_answers(label: object, verdict: bool) -> None:
    """Verdicts are booleans, and what csv files have instead."""
    row = {"prompt": "Q", "completion": "A", "label": label}
    assert normalise(row, "KTO") == {"prompt": "Q", "completion": "A", "label": verdict}


@pytest.mark.parametrize("label", ["good", 2, None, 0.5])
def test_bad_verdicts(label: object) -> None:
    """Anything else is no verdict."""
    with pytest.raises(BadField, match="must be true or false") as caught:
        normalise({"prompt": "Q", "completion": "A", "label": label}, "KTO")
    assert caught.value.field == "label"


@pytest.mark.parametrize(
    ("label", "name"), [("spam", "spam"), (" spam ", "spam"), (3, "3"), (3.0, "3"), (True, "true")]
)
def test_labels(label: object, name: str) -> None:
    """Labels are words; numbers become the words they are written as."""
    assert normalise({"text": "x", "label": label}, "Classification") == {"text": "x", "label": name}


@pytest.mark.parametrize("label", ["", None, 0.5, ["a"]])
def test_bad_labels(label: object) -> None:
    """Fractions and lists are no labels."""
    with pytest.raises(BadField) as caught:
        normalise({"text": "x", "label": label}, "Classification")
    assert caught.value.field == "label"


@pytest.mark.parametrize(
    ("objective", "values", "found"),
    [
        ("DPO", {"prompt": "Q", "completion": "A"}, "PromptCompletion"),
        ("SFT", {"chosen": "a b", "rejected": "a c"}, "Preference"),
        ("Classification", {"messages": [ASK, GOOD]}, "Messages"),
        ("KTO", {"text": "x"}, "Text"),
    ],
)
def test_rows_of_another_objective(objective: ObjectiveType, values: dict[str, Any], found: str) -> None:
    """Rows that another objective could learn from are named as what they are."""
    with pytest.raises(InvalidData, match=f"have format {found}, which objective {objective} cannot learn from"):
        normalise(values, objective)


def test_the_objective_decides_between_formats() -> None:
    """The same columns are pairs of prompt and answer for SFT, and judged answers for KTO."""
    values = {"prompt": "Q", "completion": "A", "label": True}
    assert choose_format("Auto", None, values, "f: line 1", "SFT").name == "PromptCompletion"
    assert choose_format("Auto", None, values, "f: line 1", "KTO").name == "UnpairedPreference"
    values = {"text": "x", "label": "spam"}
    assert choose_format("Auto", None, values, "f: line 1", "SFT").name == "Text"
    assert choose_format("Auto", None, values, "f: line 1", "Classification").name == "Labelled"


def test_labels_outside_the_list(tmp_path: Path) -> None:
    """Rows whose label is not among those of the spec are all named, before anything is trained."""
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "x", "kind": label} for label in ("spam", "ham", 3, "Spam")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = Dataset.model_validate({"train": [{"uri": "s3://data/rows.jsonl"}], "columns": {"label": "kind"}})
    paths = {"s3://data/rows.jsonl": {"s3://data/rows.jsonl": path}}

    def prepared(labels: Sequence[str]) -> PreparedData:
        return prepare(dataset, paths, tmp_path / "out", 0, Stop(), ignore, "Classification", (), labels)

    with pytest.raises(BadRows) as caught:
        prepared(["ham", "spam"])
    assert caught.value.lines == (
        "s3://data/rows.jsonl: line 3: kind: is '3', which is not among the labels 'ham', 'spam'",
        "s3://data/rows.jsonl: line 4: kind: is 'Spam', which is not among the labels 'ham', 'spam'",
    )
    assert prepared(()).train_rows == len(rows)
