"""Which files of a data set on the Hub make up a split: against the `datasets` library, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest

from tunewright_trainer.errors import InvalidConfiguration, InvalidData, InvalidInput, MissingFile
from tunewright_trainer.hub_splits import split_files

URI = "hf://datasets/org/name"
CONTENTS = {".csv": "text\na\n", ".json": '[{"text": "a"}]'}
SHARDS = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet")
LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("train.jsonl",),
    ("rows.jsonl",),
    ("rows.jsonl", "more/rows.jsonl", "LICENSE", "config.json", ".hidden.jsonl", "__cache/a.jsonl"),
    ("train.jsonl", "test.jsonl", "validation.jsonl"),
    ("data/train.csv", "data/test.csv"),
    ("train_0.csv", "train_10.csv", "train_2.csv", "dev.csv"),
    ("my-train-set.jsonl", "my-valid-set.jsonl"),
    ("data/train/a.json", "data/train/b.json", "data/test/a.json"),
    ("en-train/a.jsonl", "en-eval/a.jsonl", "unrelated.jsonl"),
    ("training/x.jsonl", "evaluation/x.jsonl"),
    ("train.csv", "train.jsonl", "train.json"),
    ("train.jsonl", "train.csv"),
    SHARDS,
    ("data/sft-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl", "other/train.jsonl"),
)
CONFIGURATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("data_files: rows.jsonl", ("rows.jsonl", "train.jsonl")),
    ("data_files: [a.jsonl, b/*.jsonl]", ("a.jsonl", "b/1.jsonl", "b/2.jsonl", "train.jsonl")),
    ("data_files: [{split: train, path: x/*}, {split: held_out, path: [y.csv]}]", ("x/1.csv", "x/2.csv", "y.csv")),
    ("data_files: [{split: train, path: '**/*-a.jsonl'}]", ("1-a.jsonl", "b/2-a.jsonl", "b/2-b.jsonl")),
    ("data_dir: en", ("en/train.jsonl", "en/test.jsonl", "de/train.jsonl")),
    ("data_dir: en\n  data_files: 'all*'", ("en/all.jsonl", "all.jsonl")),
    ("description: nothing about files", ("train.jsonl", "test.jsonl")),
)


def readme(*configurations: str) -> str:
    """Return a README with configurations named a, b, ..."""
    names = "abc"
    entries = [f"- config_name: {name}\n  {body}\n" for name, body in zip(names, configurations, strict=False)]
    return "---\nlicense: mit\nconfigs:\n" + "".join(entries) + "---\n# Rows\n"


def found_by_the_library(folder: Path, names: Sequence[str], card: str) -> dict[str, list[str]]:
    """Return what `datasets` makes of such files in a folder."""
    root = folder / "rows"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(CONTENTS.get(Path(name).suffix, '{"text": "a"}\n'))
    if card:
        (root / "README.md").write_text(card)
    builder = datasets.load_dataset_builder(str(root), cache_dir=str(folder / "cache"))
    files = builder.config.data_files
    return {
        split: [str(Path(path).relative_to(root)) for path in dict.fromkeys(paths)] for split, paths in files.items()
    }


@pytest.mark.parametrize("names", LAYOUTS, ids=" ".join)
def test_names_tell_the_splits_that_the_datasets_library_finds(names: tuple[str, ...], tmp_path: Path) -> None:
    """The same splits, the same files, in the same order."""
    wanted = found_by_the_library(tmp_path, names, "")
    found = {split: split_files(URI, names, "", split) for split in wanted}
    assert found == wanted


@pytest.mark.parametrize(("configuration", "names"), CONFIGURATIONS)
def test_the_readme_tells_the_splits_that_the_datasets_library_finds(
    configuration: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """What stands under `configs` goes before the names of the files."""
    card = readme(configuration)
    wanted = found_by_the_library(tmp_path, names, card)
    found = {split: split_files(URI, names, card, split) for split in wanted}
    assert found == wanted


def test_the_default_of_several_configurations_is_taken() -> None:
    """By its name or by its mark."""
    marked = readme("data_files: a.jsonl", "data_files: b.jsonl\n  default: true")
    assert split_files(URI, ["a.jsonl", "b.jsonl"], marked, "train") == ["b.jsonl"]
    named = marked.replace("  default: true\n", "").replace("config_name: b", "config_name: default")
    assert split_files(URI, ["a.jsonl", "b.jsonl"], named, "train") == ["b.jsonl"]


@pytest.mark.parametrize(
    ("names", "card", "split", "error", "message"),
    [
        (SHARDS, "", "validation", MissingFile, "has no split 'validation': set split to one of train, test"),
        (("LICENSE.md/a", ".gitattributes", "README.md"), "", "test", MissingFile, "no split 'test'.* one of train"),
        (
            (".gitattributes", "README.md"),
            "",
            "train",
            MissingFile,
            "no files of rows; its files: .gitattributes",
        ),
        ((), "", "train", MissingFile, "no files of rows; its files: none"),
        (("train.txt", "train.jsonl.gz"), "", "train", InvalidData, "not read: train.jsonl.gz, train.txt; use .jsonl"),
        (
            ("a/train.jsonl", "b/train.jsonl"),
            readme("data_dir: a", "data_dir: b"),
            "train",
            InvalidConfiguration,
            r"several configurations \(a, b\) and not one that is the default: .* such as hf://datasets/org/name/path",
        ),
        (("a.jsonl",), readme("data_files: b.jsonl"), "train", MissingFile, "no file is at b.jsonl, where README.md"),
        (("a.jsonl",), readme("data_files: 'x**.jsonl'"), "train", InvalidData, "cannot be found: Invalid pattern"),
        (("a.jsonl",), readme("data_files: 1"), "train", InvalidData, "data_files has 1 where a path or a list"),
        (("a.jsonl",), "---\nconfigs: a: b\n---\n", "train", InvalidData, r"cannot be understood \(ScannerError: "),
        (("a.jsonl",), "---\nconfigs: a\n---\n", "train", InvalidData, "cannot be understood"),
        (("a.jsonl",), "---\nconfigs: [{data_files: a}]\n---\n", "train", InvalidData, "KeyError: 'config_name'"),
    ],
)
def test_what_cannot_be_told_is_explained(
    names: tuple[str, ...], card: str, split: str, error: type[InvalidInput], message: str
) -> None:
    """With what there is instead."""
    with pytest.raises(error, match=message) as caught:
        split_files(URI, names, card, split)
    assert str(caught.value).startswith(f"{URI}: ")


def test_long_lists_of_files_are_cut() -> None:
    """A message is no listing."""
    with pytest.raises(InvalidData, match=r"train_09.txt and 90 more; use"):
        split_files(URI, [f"train_{number:02}.txt" for number in range(100)], "", "train")
