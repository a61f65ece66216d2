"""Checks a base model's files without torch, so that a wrong prefix costs a second and not a download."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tunewright_trainer.errors import InvalidModel, MissingFile
from tunewright_trainer.transfer import StoredFile

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"^model-.+\.safetensors$")
"""Names of weight files beside an index."""
SIDE_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Configuration and tokenizer. Never *.py (code) and never *.bin, *.pt, *.pkl (pickles run code when they are read)."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
MAX_HEADER_BYTES = 100 * 1024 * 1024
"""The limit of the safetensors format itself."""


def select_files(uri: str, files: Iterable[StoredFile]) -> list[StoredFile]:
    """Choose what a run needs of a model folder: configuration, tokenizer, one set of safetensors.

    Args:
        uri: The folder, for messages.
        files: All that lies in it.

    Raises:
        MissingFile: Nothing lies there.
        InvalidModel: It is not a whole model.
    """
    top = {file.name: file for file in files if "/" not in file.name}
    if not top:
        raise MissingFile(f"{uri}: no files are there: a model is named by the folder that holds its {CONFIG}")
    if CONFIG not in top:
        raise InvalidModel(f"{uri}: no {CONFIG}: {_what_instead(top)}")
    if WEIGHTS_INDEX in top:
        weights = [name for name in top if SHARD.match(name)]
    else:
        weights = [WEIGHTS] if WEIGHTS in top else []
    if not weights:
        raise InvalidModel(f"{uri}: no {WEIGHTS}: {other_weights(top)}")
    if not any(all(name in top for name in names) for names in _TOKENIZERS):
        raise InvalidModel(
            f"{uri}: no tokenizer: tokenizer.json (or tokenizer.model, or vocab.json with merges.txt) is missing"
        )
    side_files = [name for name in top if name.endswith(SIDE_FILES) and not name.startswith("pytorch_model")]
    return [top[name] for name in sorted({*side_files, *weights})]


def _what_instead(names: Iterable[str]) -> str:
    if "adapter_config.json" in names:
        return "this is an adapter, not a whole model: model.uri takes the base model"
    return f"there are {_listed(names)}"


def other_weights(names: Iterable[str]) -> str:
    """Say what weights a folder has where it has none that are loaded, for messages."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return f"the weights are pickles ({_listed(pickles)}), which are never loaded: convert the model to safetensors"
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        return f"the weights have other names ({_listed(tensors)})" + (
            f", and {WEIGHTS_INDEX} is missing" if any(map(SHARD.match, tensors)) else ""
        )
    return f"there are {_listed(names)}"


def model_version(files: Sequence[StoredFile]) -> str:
    """Name the content of a model folder by what storage says of its files."""
    lines = "".join(f"{file.name}\t{file.size_bytes}\t{file.version}\n" for file in sorted(files, key=lambda f: f.name))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def check_folder(uri: str, folder: Path) -> None:
    """Check a model folder on this machine: configuration readable, every shard there and whole.

    Raises:
        InvalidModel: What is wrong, by file.
    """
    config = _read_object(uri, folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise InvalidModel(f"{uri}/{CONFIG}: no model_type: this is not the configuration of a transformers model")
    shards = _shards(uri, folder) if (folder / WEIGHTS_INDEX).is_file() else [WEIGHTS]
    for name in shards:
        read_header(uri, folder / name)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            _read_object(uri, folder / name)


def _shards(uri: str, folder: Path) -> list[str]:
    index = _read_object(uri, folder / WEIGHTS_INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidModel(f"{uri}/{WEIGHTS_INDEX}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    strange = [name for name in names if not SHARD.match(name) or "/" in name or "\\" in name]
    if strange:
        raise InvalidModel(
            f"{uri}/{WEIGHTS_INDEX}: names {_listed(strange)}, which is no model-*.safetensors beside it"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InvalidModel(f"{uri}: {len(missing)} of {len(names)} weight files are missing: {_listed(missing)}")
    return names


def _read_object(uri: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{uri}/{path.name}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidModel(f"{uri}/{path.name}: must be a JSON object")
    return document


def read_header(uri: str, path: Path) -> dict[str, Any]:
    """Return the tensors that a safetensors file's header names, after comparing it with the size of the file: a
    truncated or mistaken file shows here, not in the worker.

    Raises:
        InvalidModel: What is wrong.
    """
    with path.open("rb") as file:
        return parse_header(f"{uri}/{path.name}", path.stat().st_size, lambda _, length: file.read(length))[0]


def parse_header(place: str, size: int, read: Callable[[int, int], bytes]) -> tuple[dict[str, Any], int]:
    """Return the tensors that a safetensors file's header names and the offset of their bytes in the file.

    Args:
        place: The file, for messages.
        size: Bytes of the file.
        read: Gives bytes of the file by offset and length; called with ascending offsets.

    Raises:
        InvalidModel: What is wrong.
    """
    prefix = read(0, min(8, size))
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size):
        raise InvalidModel(f"{place}: not a safetensors file ({size} bytes{_lfs_hint(size)})")
    try:
        header = json.loads(read(8, min(length, size - 8)))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise InvalidModel(f"{place}: the safetensors header is damaged") from None
    if size != 8 + length + end:
        raise InvalidModel(f"{place}: truncated: {size} bytes, the header asks for {8 + length + end}")
    return tensors, 8 + length


def _lfs_hint(size: int) -> str:
    return "; most likely a git-lfs pointer: fetch the real file with `git lfs pull`" if 100 < size < 200 else ""


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
