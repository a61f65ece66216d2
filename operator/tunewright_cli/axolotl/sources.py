"""Where rows and models lie: what Axolotl reads from a disk or from the Hub, as URIs that a pod can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunewright_cli.axolotl.draft import Keys, Kind

PLACEHOLDER = "s3://replace-me"
"""Bucket of what Axolotl finds on a disk and a pod cannot."""
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"

_FILES = (".jsonl", ".json", ".csv", ".parquet")
_OTHER_FILES = (".arrow", ".txt", ".gz", ".zst")
_HUB_FILE = r"[A-Za-z0-9_=+@,-][A-Za-z0-9_.=+@,-]*(/[A-Za-z0-9_=+@,-][A-Za-z0-9_.=+@,-]*)*"


def files_of(keys: Keys, usual_split: str) -> list[dict[str, Any]]:
    """Return the sources that the files of a data set become.

    Args:
        keys: The data set.
        usual_split: What Axolotl reads of a Hub data set where nothing is said.
    """
    path = keys.take_text("path")
    files = keys.take("data_files")
    files = [files] if isinstance(files, str) else files
    of_hub = {name: value for name in ("name", "revision") if (value := keys.take_text(name)) is not None}
    if of_hub.get("name") == "default":
        del of_hub["name"]
    split = keys.take_text("split") or usual_split
    first = re.fullmatch(r"(\w+)\[:([1-9][0-9]*)\]", split)
    limit = {"maxSamples": int(first[2])} if first else {}
    split = first[1] if first else split
    if path is None and files is None:
        keys.note(Kind.ERROR, "path", "missing: say where the rows are")
        return []
    if files is not None and (not isinstance(files, list) or not all(isinstance(name, str) for name in files)):
        keys.note(Kind.ERROR, "data_files", "must be a path or a list of paths")
        return []
    on_hub = _on_hub(path or "", files, of_hub, split)
    if on_hub:
        return [{**source, **limit} for source in on_hub]
    if split not in ("train", usual_split):
        of_hub["split"] = split
    key, names = ("path", [path or ""]) if files is None else ("data_files", files)
    return [{"uri": _data_uri(keys, key, name, of_hub), **limit} for name in names]


def _on_hub(path: str, files: list[str] | None, of_hub: Mapping[str, str], split: str) -> list[dict[str, Any]]:
    """Return a Hub data set's files, or its split; nothing for what a source cannot say."""
    if re.fullmatch(HUB_NAME, path) is None or path.endswith(_FILES + _OTHER_FILES) or "name" in of_hub:
        return []
    revision = {"revision": of_hub["revision"]} if "revision" in of_hub else {}
    if files is not None:
        if not all(re.fullmatch(_HUB_FILE, name) and name.endswith(_FILES) for name in files):
            return []
        return [{"uri": f"hf://datasets/{path}/{name}", **revision} for name in files]
    if re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", split) is None:
        return []
    return [{"uri": f"hf://datasets/{path}", **revision, **({} if split == "train" else {"split": split})}]


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
