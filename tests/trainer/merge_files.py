"""Models and adapters of a few numbers, written without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunewright_trainer.merge.adapter import load_adapter
from tunewright_trainer.merge.checkpoint import Checkpoint, read_tensor, read_tensors
from tunewright_trainer.merge.numbers import to_float32
from tunewright_trainer.merge.readers import FolderReader
from tunewright_trainer.merge.sinks import FolderSink
from tunewright_trainer.merge.stream import MergeFindings, merge

Array = NDArray[Any]
Tensors = Mapping[str, Array | tuple[str, Array]]
_FORMATS = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "hf://org/base"}


def safetensors(tensors: Tensors) -> bytes:
    """Build a safetensors file; bfloat16 is given as ("BF16", uint16)."""
    header: dict[str, Any] = {}
    data = b""
    for name, given in tensors.items():
        dtype, array = given if isinstance(given, tuple) else (_FORMATS[str(given.dtype)], given)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def write_model(folder: Path, *shards: Tensors, config: Mapping[str, Any] | None = None) -> Path:
    """Write a model folder; more than one shard get an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / name).write_bytes(safetensors(tensors))
        places.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def write_adapter(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = None) -> Path:
    """Write an adapter folder."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **(config or {})}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    return folder


def normal(*shape: int, seed: int = 0) -> Array:
    """Draw numbers of the size of weights."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.1)


def read_folder(folder: Path) -> dict[str, Array]:
    """Return the tensors of a folder as float32."""
    checkpoint = Checkpoint(FolderReader(folder))
    return {name: checkpoint.read_float32(name) for name in checkpoint.tensors}


def read_file(path: Path) -> dict[str, Array]:
    """Return the tensors of a file as float32."""
    reader = FolderReader(path.parent)
    found = read_tensors(reader, path.name)
    return {name: to_float32(read_tensor(reader, tensor), tensor.dtype) for name, tensor in found.items()}


def merge_folders(base: Path, adapter: Path, target: Path, **options: Any) -> MergeFindings:
    """Merge from folder to folder."""
    return merge(Checkpoint(FolderReader(base)), load_adapter(adapter), FolderSink(target), **options)
