"""Checking a whole data set and writing it down for the worker."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tunewright_api.v1alpha1.parts import Dataset
from tunewright_trainer.dataset import MAX_BAD_ROWS, BadRows, PreparedData, prepare, validation_count
from tunewright_trainer.errors import InvalidData, Preempted
from tunewright_trainer.transfer import Stop, ignore


def rows(count: int, start: int = 0) -> str:
    """Build numbered prompt/completion rows."""
    return "".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) + "\n" for n in range(start, start + count))


def run(
    folder: Path, files: dict[str, str], *, seed: int = 1, stop: Stop | None = None, **dataset: Any
) -> PreparedData:
    """Prepare the data set whose train files are `files`, unless `dataset` says otherwise."""
    paths = {}
    for name, content in files.items():
        (folder / name).write_text(content)
        paths[f"s3://data/{name}"] = {f"s3://data/{name}": folder / name}
    document = {"train": [{"uri": uri} for uri in paths], **dataset}
    parsed = Dataset.model_validate(document)
    return prepare(parsed, paths, folder / "out", seed, stop or Stop(), ignore)


def prompts(path: Path | None) -> list[str]:
    """Return the prompts of a written file."""
    assert path is not None
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_writes_all_rows_in_order(tmp_path: Path) -> None:
    """The rows of all train files follow each other; without validation there is no second file."""
    data = run(tmp_path, {"a.jsonl": rows(3), "b.jsonl": rows(2, 3)})
    assert prompts(data.train_path) == ["p0", "p1", "p2", "p3", "p4"]
    assert (data.train_rows, data.validation_rows, data.validation_path) == (5, 0, None)


def test_max_samples_takes_the_first_rows(tmp_path: Path) -> None:
    """maxSamples counts per file, and what lies behind it is not even checked."""
    data = run(
        tmp_path,
        {"a.jsonl": rows(3) + "broken", "b.jsonl": rows(1, 9)},
        train=[{"uri": "s3://data/a.jsonl", "maxSamples": 2}, {"uri": "s3://data/b.jsonl", "maxSamples": 5}],
    )
    assert prompts(data.train_path) == ["p0", "p1", "p9"]


def test_the_files_of_a_split_are_one_source(tmp_path: Path) -> None:
    """Their rows follow each other, maxSamples counts over all of them, and a bad row is named by its own file."""
    uris = [f"hf://datasets/org/name/{name}.jsonl" for name in ("z", "a")]
    paths = {uri: tmp_path / uri.rpartition("/")[2] for uri in uris}
    paths[uris[0]].write_text(rows(3))
    paths[uris[1]].write_text(rows(1, 7) + "broken\n")
    source = {"uri": "hf://datasets/org/name", "maxSamples": 4}

    def prepared(source: dict[str, Any]) -> PreparedData:
        dataset = Dataset.model_validate({"train": [source]})
        return prepare(dataset, {"hf://datasets/org/name#train": paths}, tmp_path / "out", 1, Stop(), ignore)

    assert prompts(prepared(source).train_path) == ["p0", "p1", "p2", "p7"]
    with pytest.raises(BadRows, match=r"hf://datasets/org/name/a\.jsonl: line 2"):
        prepared({**source, "maxSamples": 5})


def test_weights_say_how_often_rows_are_used(tmp_path: Path) -> None:
    """2 takes every row twice; a fraction draws rows by the seed, the same ones every time."""
    files = {"a.jsonl": rows(2), "b.jsonl": rows(400, 10)}
    train = [{"uri": "s3://data/a.jsonl", "weight": 2}, {"uri": "s3://data/b.jsonl", "weight": 0.25}]
    found = prompts(run(tmp_path, files, train=train).train_path)
    assert found[:4] == ["p0", "p0", "p1", "p1"]
    assert 70 < len(found) - 4 < 130
    assert found == prompts(run(tmp_path, files, train=train).train_path)


def test_validation_files(tmp_path: Path) -> None:
    """Validation files go where the worker evaluates."""
    data = run(
        tmp_path,
        {"a.jsonl": rows(3), "v.jsonl": rows(2, 7)},
        train=[{"uri": "s3://data/a.jsonl"}],
        validation=[{"uri": "s3://data/v.jsonl"}],
    )
    assert prompts(data.validation_path) == ["p7", "p8"]
    assert (data.train_rows, data.validation_rows) == (3, 2)


def test_the_split_is_made_by_the_seed(tmp_path: Path) -> None:
    """The same seed holds out the same rows; together both files have every row once."""
    held: dict[int, list[str]] = {}
    for attempt, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        data = run(folder, {"a.jsonl": rows(40)}, seed=seed, validationFraction=0.25)
        assert (data.train_rows, data.validation_rows) == (30, 10)
        both = prompts(data.train_path) + prompts(data.validation_path)
        assert sorted(both) == sorted(f"p{n}" for n in range(40))
        assert held.setdefault(seed, prompts(data.validation_path)) == prompts(data.validation_path)
    assert held[1] != held[2]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (100, 0.05, 5), (10, 0.999, 9), (3, 0.5, 2)]
)
def test_both_sides_of_a_split_have_a_row(count: int, fraction: float, held_out: int) -> None:
    """However small the data, there is something to train on and something to evaluate on."""
    assert validation_count(count, fraction) == held_out


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    """One row is too few for validationFraction."""
    with pytest.raises(InvalidData, match="needs at least 2 rows to split, there is 1"):
        run(tmp_path, {"a.jsonl": rows(1)}, validationFraction=0.5)


def test_names_bad_rows_of_all_files_at_once(tmp_path: Path) -> None:
    """File, line and field of every bad row come in one message."""
    with pytest.raises(BadRows) as caught:
        run(
            tmp_path,
            {"a.jsonl": rows(2) + '{"prompt": "x", "completion": 1}\n', "v.jsonl": rows(1) + "{\n"},
            train=[{"uri": "s3://data/a.jsonl"}],
            validation=[{"uri": "s3://data/v.jsonl"}],
        )
    assert str(caught.value) == (
        "2 bad rows, nothing was trained:\n"
        "s3://data/a.jsonl: line 3: completion: must be a string, is a number\n"
        "s3://data/v.jsonl: line 2: not valid JSON: Expecting property name enclosed in double quotes at character 2"
    )


def test_stops_at_twenty_bad_rows(tmp_path: Path) -> None:
    """A file of another kind does not give a million messages, and the message fits a status."""
    with pytest.raises(BadRows) as caught:
        run(tmp_path, {"a.jsonl": rows(1) + '{"prompt": 1, "completion": "c"}\n' * 500})
    assert len(caught.value.lines) == MAX_BAD_ROWS
    assert caught.value.lines[-1] == "s3://data/a.jsonl: line 21: prompt: must be a string, is a number"
    assert str(caught.value).startswith("at least 20 bad rows")
    assert str(caught.value).endswith(" more in the log")
    assert len(str(caught.value)) < 1024


def test_a_long_line_still_fits_the_message(tmp_path: Path) -> None:
    """One bad row with an endless name does not burst the status."""
    with pytest.raises(BadRows) as caught:
        run(tmp_path, {"a.jsonl": '{"messages": [{"role": "' + "x" * 5000 + '", "content": "y"}]}\n'})
    assert len(str(caught.value)) < 1024


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n")])
def test_no_rows(tmp_path: Path, name: str, content: str) -> None:
    """A file that is not empty but has no rows is named."""
    with pytest.raises(InvalidData, match=f"s3://data/{name}: no rows"):
        run(tmp_path, {name: content})


def test_stops_when_asked(tmp_path: Path) -> None:
    """A request to stop is seen while rows are checked."""
    stop = Stop()
    stop.request("SIGTERM")
    with pytest.raises(Preempted, match="SIGTERM"):
        run(tmp_path, {"a.jsonl": rows(5)}, stop=stop)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """12 MB of rows go through in a few MB."""
    row = json.dumps({"prompt": "p" * 500, "completion": "c" * 500})
    content = "\n".join([row] * 12_000) if name == "a.jsonl" else "[" + ",\n".join([row] * 12_000) + "]"
    tracemalloc.start()
    before = len(content)
    (tmp_path / name).write_text(content)
    del content
    tracemalloc.reset_peak()
    base = tracemalloc.get_traced_memory()[0]
    uri = f"s3://data/{name}"
    dataset = Dataset.model_validate({"train": [{"uri": uri}]})
    data = prepare(dataset, {uri: {uri: tmp_path / name}}, tmp_path / "out", 1, Stop(), ignore)
    peak = tracemalloc.get_traced_memory()[1] - base
    tracemalloc.stop()
    assert data.train_rows == 12_000
    assert before > 12_000_000
    assert peak < 8_000_000
