"""YAML is read as kubectl reads it, and every field's place is known."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright_cli.errors import InvalidFile
from tunewright_cli.kubectl_yaml import Position, read_documents

# Printed by `kubectl label --local -o json` (1.36) for the same text.
SCALARS: dict[str, Any] = {
    "2e-4": 0.0002, "2E4": 20000, "1e5": 100000, "+1e-5": 1e-05, "5.": 5, ".5": 0.5, "1.5": 1.5, "1e400": "1e400",
    "1_000": 1000, "1_0.5": 10.5, "._5": "._5", "1__0": 10, "+3": 3, "-7": -7, "-0": 0, "+": "+",
    "0x1F": 31, "0X1f": 31, "-0x10": -16, "0x": "0x", "010": 8, "-010": -8, "0o17": 15, "0O17": 15, "0_7": 7, "00": 0,
    "08": 8, "089": 89, "0b11": 3, "0B11": 3, "-0b11": -3, "+0b1": 1, "e5": "e5", "1.2.3": "1.2.3", "1m": "1m",
    "y": True, "No": False, "on": True, "~": None, "null": None, "2001-01-01": "2001-01-01",
    "12345678901234567890123": 1.2345678901234568e22,
}  # fmt: skip

DOCUMENT = """\
kind: FineTuneJob
spec:
  model: {uri: x}
  train:
    - uri: a
      maxSamples: 3
    - uri: b
"""


def read(text: str) -> list[Any]:
    """Return the contents of all documents."""
    return [document.content for document in read_documents(text, "f.yaml")]


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_plain_scalars_have_kubectl_s_value_and_type(text: str, value: Any) -> None:
    """The API server sees what kubectl makes of the text, so the check must see the same."""
    (content,) = read(f"a: {text}")
    assert content == {"a": value}
    assert type(content["a"]) is type(value)


@pytest.mark.parametrize("text", ['"2e-4"', "'yes'", '"1"', "|\n  5", "!!str 7"])
def test_quotes_and_tags_make_text(text: str) -> None:
    """Only plain scalars are numbers and booleans."""
    (content,) = read(f"a: {text}")
    assert isinstance(content["a"], str)


def test_keys_are_text() -> None:
    """JSON has no other keys."""
    assert read("1: a\ntrue: b\n1.5: c") == [{"1": "a", "true": "b", "1.5": "c"}]


def test_anchors_and_merge_keys_work_as_in_kubectl() -> None:
    """A field of its own wins over a merged one, an earlier merged mapping over a later one."""
    text = "a: &a {u: 1, v: 1}\nb: &b {v: 2, w: 2}\nc: {<<: [*a, *b], u: 9}\nd: *a"
    (content,) = read(text)
    assert content["c"] == {"u": 9, "v": 1, "w": 2}
    assert content["d"] == {"u": 1, "v": 1}


def test_several_documents_without_the_empty_ones() -> None:
    """Separators and comments alone are no document."""
    assert read("---\n# nothing\n---\na: 1\n---\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        ("kind", 1, 1),
        ("spec.model.uri", 3, 11),
        ("spec.train[0].maxSamples", 6, 7),
        ("spec.train[1]", 7, 7),
        ("spec.train[1].uri", 7, 7),
        ("spec.missing", 2, 1),
        ("spec.train[1].missing.deeper", 7, 7),
        ("metadata.name", 1, 1),
    ],
)
def test_a_field_has_a_place_and_a_missing_one_that_of_the_part_around_it(path: str, line: int, column: int) -> None:
    """Lines and columns count from 1, as editors do."""
    (document,) = read_documents(DOCUMENT, "f.yaml")
    assert document.position(path) == Position(line, column)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3:1: the key 'a' stands here for the second time"),
        ("a: [1\n", "f.yaml:2:1: not valid YAML"),
        ("a: b: c\n", "f.yaml:1:5: not valid YAML"),
        ("a: &x [*x]\n", "f.yaml:1:4: an anchor may not contain itself"),
        ("a: *nowhere\n", "f.yaml:1:4: not valid YAML"),
        ("? [a]\n: 1\n", "f.yaml:1:3: a key must be text"),
        ("a: \x01", "f.yaml: not valid YAML"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(text: str, message: str) -> None:
    """What kubectl would refuse, with file, line and column."""
    with pytest.raises(InvalidFile) as caught:
        read(text)
    assert message in str(caught.value)
