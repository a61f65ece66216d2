"""Where rows and models lie: what Axolotl reads from a disk or from the Hub, as URIs that a pod can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunewright_cli.axolotl.draft import Keys, Kind

PLACEHOLDER = "s3://replace-me"
"""Bucket of what Axolotl finds on a disk or on the Hub and a pod cannot."""

_FILES = (".jsonl", ".json", ".csv", ".parquet")
_OTHER_FILES = (".arrow", ".txt", ".gz", ".zst")


def files_of(keys: Keys) -> list[dict[str, Any]]:
    """Return the sources that the files of a data set become."""
    path = keys.take_text("path")
    files = keys.take("data_files")
    files = [files] if isinstance(files, str) else files
    of_hub = {name: value for name in ("name", "revision") if (value := keys.take_text(name)) is not None}
    split = keys.take_text("split")
    first = re.fullmatch(r"\w+\[:([1-9][0-9]*)\]", split or "")
    limit = {"maxSamples": int(first[1])} if first else {}
    if split is not None and first is None and split != "train":
        of_hub["split"] = split
    if files is None:
        if path is None:
            keys.note(Kind.ERROR, "path", "missing: say where the rows are")
            return []
        key, files = "path", [path]
    else:
        key = "data_files"
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        keys.note(Kind.ERROR, key, "must be a path or a list of paths")
        return []
    return [{"uri": _data_uri(keys, key, name, of_hub), **limit} for name in files]


def _data_uri(keys: Keys, key: str, path: str, of_hub: Mapping[str, str]) -> str:
    if path.startswith("s3://"):
        if not path.endswith(_FILES):
            keys.note(Kind.TO_DO, key, f"{path}: name one file of {', '.join(_FILES)} in dataset")
        return path
    part = "".join(f", {name} {value}" for name, value in of_hub.items())
    is_file = path.endswith(_FILES + _OTHER_FILES) or path.startswith(("/", "./", "../", "~"))
    name = bucket_key(path)
    if not name.endswith(_FILES):
        name = name.removesuffix(next((end for end in _OTHER_FILES if name.endswith(end)), "")) + ".jsonl"
    uri = f"{PLACEHOLDER}/{name}"
    what = f"the file {path}" if is_file or "://" in path else f"the Hub data set {path}"
    keys.note(Kind.TO_DO, key, f"write {what}{part} to your own bucket, and write its URI in place of {uri}")
    return uri


def bucket_key(path: str) -> str:
    """Return a path or name in the letters that keys in a bucket may have here, without what climbs out of a folder."""
    parts = re.sub(r"^[a-z]+://", "", path).split("/")
    clean = [re.sub(r"[^A-Za-z0-9_.=+@,-]", "-", part.lstrip(".~")) for part in parts]
    return "/".join(part for part in clean if part) or "data"
