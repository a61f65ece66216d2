"""Checks of a base model's files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tunewright_trainer.errors import InvalidModel, MissingFile
from tunewright_trainer.model_files import check_folder, model_version, select_files
from tunewright_trainer.transfer import StoredFile

URI = "s3://models/base"
SMALL = ("config.json", "model.safetensors", "tokenizer.json")


def stored(*names: str) -> list[StoredFile]:
    """Describe files by name only."""
    return [StoredFile(name, 1, "v") for name in names]


def safetensors(size: int = 8) -> bytes:
    """Build a file with one tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def folder(path: Path, **changes: bytes | None) -> Path:
    """Build a sharded model folder; `changes` by name with '_' for '.' and '-' replace files or leave them out."""
    files: dict[str, Any] = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        ).encode(),
        "model-1.safetensors": safetensors(),
        "model-2.safetensors": safetensors(),
        "tokenizer.json": b"{}",
    }
    for name, content in files.items():
        changed = changes.get(name.replace(".", "_").replace("-", "_"), content)
        if changed is not None:
            (path / name).write_bytes(changed)
    return path


def test_selects_what_is_needed() -> None:
    """Pickles, code, other weights and subfolders stay where they are."""
    extra = (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling.py",
        "onnx/model.safetensors",
        "README.md",
        "tf.h5",
    )
    names = [file.name for file in select_files(URI, stored(*SMALL, "merges.txt", "chat_template.jinja", *extra))]
    assert names == ["chat_template.jinja", "config.json", "merges.txt", "model.safetensors", "tokenizer.json"]


def test_selects_shards_by_the_index() -> None:
    """With an index the shards are the weights; a copy in one file is not fetched as well."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    chosen = select_files(
        URI, stored("config.json", "tokenizer.json", "model.safetensors.index.json", "model.safetensors", *shards)
    )
    assert [file.name for file in chosen if file.name.endswith(".safetensors")] == list(shards)


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        ((), MissingFile, "no files are there: a model is named by the folder that holds its config.json"),
        (("sub/config.json",), MissingFile, "no files are there"),
        (
            ("model.safetensors", "tokenizer.json"),
            InvalidModel,
            "no config.json: there are model.safetensors, tokenizer",
        ),
        (("adapter_config.json", "adapter_model.safetensors"), InvalidModel, "this is an adapter, not a whole model"),
        (
            ("config.json", "tokenizer.json", "pytorch_model.bin"),
            InvalidModel,
            "the weights are pickles (pytorch_model.bin)",
        ),
        (
            ("config.json", "tokenizer.json", "x.safetensors"),
            InvalidModel,
            "the weights have other names (x.safetensors)",
        ),
        (
            ("config.json", "tokenizer.json", "model-1.safetensors"),
            InvalidModel,
            "(model-1.safetensors), and model.safetensors.index.json is missing",
        ),
        (
            ("config.json", "tokenizer.json"),
            InvalidModel,
            "no model.safetensors: there are config.json, tokenizer.json",
        ),
        (("config.json", "model.safetensors"), InvalidModel, "no tokenizer: tokenizer.json (or"),
    ],
)
def test_an_incomplete_model_is_named(names: tuple[str, ...], kind: type[Exception], message: str) -> None:
    """The listing alone tells what is missing, before a byte is downloaded."""
    with pytest.raises(kind) as caught:
        select_files(URI, stored(*names))
    assert str(caught.value).startswith(f"{URI}: ")
    assert message in str(caught.value)


def test_a_whole_folder_passes(tmp_path: Path) -> None:
    """A sharded model and one in a single file are fine."""
    check_folder(URI, folder(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(safetensors())
    check_folder(URI, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_json": b"{"}, "/config.json: not valid JSON"),
        ({"config_json": b"[]"}, "/config.json: must be a JSON object"),
        ({"config_json": b"{}"}, "/config.json: no model_type"),
        ({"tokenizer_json": b"{"}, "/tokenizer.json: not valid JSON"),
        ({"model_2_safetensors": None}, ": 1 of 2 weight files are missing: model-2.safetensors"),
        ({"model_2_safetensors": safetensors()[:-1]}, "/model-2.safetensors: truncated: "),
        ({"model_2_safetensors": b""}, "/model-2.safetensors: not a safetensors file (0 bytes)"),
        ({"model_2_safetensors": b"version https://git-lfs" + b"x" * 110}, "; most likely a git-lfs pointer"),
        (
            {"model_2_safetensors": struct.pack("<Q", 4) + b"{{{{"},
            "/model-2.safetensors: the safetensors header is damaged",
        ),
        ({"model_2_safetensors": struct.pack("<Q", 10) + b'{"w": "x"}'}, "header is damaged"),
        ({"model_safetensors_index_json": b"{}"}, "/model.safetensors.index.json: no weight_map"),
        (
            {"model_safetensors_index_json": b'{"weight_map": {"a": "../x.safetensors"}}'},
            "names ../x.safetensors, which is no",
        ),
        ({"model_safetensors_index_json": b'{"weight_map": {"a": "model-/x.safetensors"}}'}, "which is no model-*"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, changes: dict[str, bytes | None], message: str) -> None:
    """A file that the worker would stumble over is named before it is started in earnest."""
    with pytest.raises(InvalidModel) as caught:
        check_folder(URI, folder(tmp_path, **changes))
    assert message in str(caught.value)


def test_the_version_is_that_of_the_content() -> None:
    """Any change of a name, size or ETag gives another version; the order of the listing does not."""
    files = stored("a", "b")
    assert model_version(files) == model_version(files[::-1])
    versions = {
        model_version(files),
        model_version(stored("a", "c")),
        model_version([files[0], StoredFile("b", 2, "v")]),
        model_version([files[0], StoredFile("b", 1, "w")]),
    }
    assert len(versions) == 4
