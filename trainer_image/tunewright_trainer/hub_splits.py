"""Which files of a data set on the Hub make up a split. Pure functions of the file names and the README.

The `datasets` library has this rule, and a test holds both to the same answers. It is not asked itself: importing it
takes the supervisor over a second and 100 MB, and it looks at the hub by a client, a cache and errors of its own, where
one request has listed all names already.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from fsspec.utils import glob_translate
from huggingface_hub import DatasetCard

from tunewright_api.v1alpha1.parts import DEFAULT_SPLIT
from tunewright_trainer.errors import InvalidConfiguration, InvalidData, MissingFile

README = "README.md"
MAX_SHOWN = 10

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = "[-._ 0-9]"
_IN_FOLDER_NAME = ("**/{0}/**", "**/{0}{1}*/**", "**/*{1}{0}/**", "**/*{1}{0}{1}*/**")
_IN_FILE_NAME = ("**/{0}{1}*", "**/*{1}{0}{1}*")
_DIGITS = "[0-9]" * 5
_SHARD = f"-{_DIGITS}-of-{_DIGITS}*.*"
_NOT_ROWS = frozenset(
    {README, "config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip", "dataset_dict.json"}
)
_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""Endings of the files that are read; where a split has as many of one kind as of another, the first one here wins."""

Patterns = Mapping[str, Sequence[str]]
"""Split -> patterns of its files."""


@dataclass(frozen=True)
class _Configuration:
    """One entry under `configs` in the README."""

    name: str
    folder: str
    patterns: Patterns | None
    """None where the files' names say what they are."""
    is_default: bool


def split_files(uri: str, names: Collection[str], readme: str, split: str) -> list[str]:
    """Return the files of a split in their order.

    Args:
        uri: The data set, for messages.
        names: All files of its repository.
        readme: Its README.md; what stands under `configs` there goes before the names.
        split: The split.

    Raises:
        MissingFile: There is no such split, or there are no files; the message lists what there is.
        InvalidConfiguration: There are several configurations and no default one; the message names them.
        InvalidData: The README cannot be understood, or files of the split are of a kind that is not read.
    """
    chosen = _choose(uri, _configurations(uri, readme))
    inside = {name.removeprefix(chosen.folder): name for name in names if name.startswith(chosen.folder)}
    patterns = chosen.patterns if chosen.patterns is not None else _conventional(inside)
    if not patterns:
        raise MissingFile(f"{uri}: the data set has no files of rows; its files: {_shown(names)}")
    if split not in patterns:
        raise MissingFile(f"{uri}: the data set has no split {split!r}: set split to one of {', '.join(patterns)}")
    try:
        matched = _matching(inside, patterns[split])
    except ValueError as error:
        raise InvalidData(f"{uri}: {README}: the files of split {split!r} cannot be found: {error}") from None
    if not matched:
        raise MissingFile(f"{uri}: no file is at {', '.join(patterns[split])}, where {README} says split {split!r} is")
    readable = _of_one_kind(matched)
    if not readable:
        raise InvalidData(
            f"{uri}: the files of split {split!r} are of kinds that are not read: {_shown(matched)}; "
            "use .jsonl, .json, .csv or .parquet"
        )
    return [inside[name] for name in readable]


def _choose(uri: str, configurations: Sequence[_Configuration]) -> _Configuration:
    if not configurations:
        return _Configuration("default", "", None, is_default=True)
    if len(configurations) == 1:
        return configurations[0]
    defaults = [one for one in configurations if one.is_default]
    if len(defaults) == 1:
        return defaults[0]
    names = ", ".join(one.name for one in configurations)
    raise InvalidConfiguration(
        f"{uri}: the data set has several configurations ({names}) and not one that is the default: give the files of "
        f"one of them as sources, such as {uri}/path/to/file.parquet"
    )


def _conventional(names: Collection[str]) -> Patterns:
    """Return the splits that the files' names tell: data/NAME-00000-of-00001.*, train/..., train.jsonl, or all."""
    shards = _matching(names, [f"data/*{_SHARD}"])
    found = {match[1] for name in shards if (match := re.match(rf"data/(.+)-{_DIGITS}-of-{_DIGITS}", name))}
    if found:
        ordered = [*(split for split in _KEYWORDS if split in found), *sorted(found - set(_KEYWORDS))]
        return {split: [f"data/{split}{_SHARD}"] for split in ordered}
    for forms in (_IN_FOLDER_NAME, _IN_FILE_NAME):
        patterns = {
            split: [form.format(word, _SEPARATORS) for word in words for form in forms]
            for split, words in _KEYWORDS.items()
        }
        present = {split: given for split, given in patterns.items() if _matching(names, given)}
        if present:
            return present
    return {DEFAULT_SPLIT: ["**"]} if _matching(names, ["**"]) else {}


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that fit, pattern after pattern, each name once.

    Raises:
        ValueError: `**` is only a part of a name.
    """
    ordered = sorted(names)
    found: dict[str, None] = {}
    for pattern in patterns:
        pattern = pattern.removeprefix("./")
        fits = re.compile(glob_translate(pattern)).match
        found.update(dict.fromkeys(name for name in ordered if fits(name) and _is_asked_for(name, pattern)))
    return list(found)


def _is_asked_for(name: str, pattern: str) -> bool:
    """Tell whether a file is no document of the hub's and not hidden, unless the pattern names such a thing."""
    path, asked = PurePosixPath(name), PurePosixPath(pattern)

    def count(parts: Iterable[str], hidden: Callable[[str], bool]) -> int:
        return sum(hidden(part) for part in parts)

    return (
        (path.name not in _NOT_ROWS or path.name == asked.name)
        and count(path.parts, _is_dotted) == count(asked.parts, _is_dotted)
        and count(path.parts[:-1], _is_special) == count(asked.parts[:-1], _is_special)
    )


def _is_dotted(part: str) -> bool:
    return part.startswith(".")


def _is_special(part: str) -> bool:
    return part.startswith("__")


def _of_one_kind(names: Sequence[str]) -> list[str]:
    """Return the files of the kind that most of them have: the same rows often lie there as csv and as parquet."""
    endings = Counter(PurePosixPath(name).suffix.lower() for name in names)
    readable = [ending for ending in _KINDS if endings[ending]]
    if not readable:
        return []
    kind = _KINDS[max(readable, key=lambda ending: endings[ending])]
    return [name for name in names if _KINDS.get(PurePosixPath(name).suffix.lower()) == kind]


def _configurations(uri: str, readme: str) -> list[_Configuration]:
    """Return what stands under `configs` in the README's front matter."""
    try:
        given = DatasetCard(readme).data.get("configs") or []
        return [_configuration(entry) for entry in given]
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InvalidData(
            f"{uri}: the front matter of {README} cannot be understood ({text}): name the files instead, such as "
            f"{uri}/path/to/file.parquet"
        ) from None


def _configuration(entry: Mapping[str, Any]) -> _Configuration:
    name, folder = str(entry["config_name"]), str(entry.get("data_dir") or "").strip("/")
    return _Configuration(
        name,
        f"{folder}/" if folder else "",
        _patterns(entry["data_files"]) if entry.get("data_files") is not None else None,
        is_default=name == "default" or bool(entry.get("default")),
    )


def _patterns(given: Any) -> Patterns:
    """Return patterns by split; files that belong to no split are the training rows."""
    if isinstance(given, list) and given and all(isinstance(item, dict) for item in given):
        return {str(item["split"]): _texts(item["path"]) for item in given}
    return {DEFAULT_SPLIT: _texts(given)}


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"data_files has {given!r} where a path or a list of paths belongs")
    return texts


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_SHOWN} more" if len(ordered) > MAX_SHOWN else ""
    return (", ".join(ordered[:MAX_SHOWN]) or "none") + more
