"""Builders for the tests of merges: adapters of the tiny Llama, published or not, documents and settings. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.trainer.kit import WRITER, Bucket
from tunewright_api.merge_run import MergeRun, build_merge_run
from tunewright_api.run_config import StorageSettings
from tunewright_api.validation import parse_adaptermerge
from tunewright_trainer import model_files, publish
from tunewright_trainer.publish import Published, Result
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.storage import Storage

HIDDEN = 64
INNER = 128
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Outputs and inputs of the modules that the adapters change, in each of two layers."""


def adapter_tensors(seed: int, rank: int = 4) -> dict[str, np.ndarray]:
    """Make the factors of a LoRA adapter that changes logits clearly."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        for module, (rows, columns) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = draw.normal(0, 0.1, (rank, columns)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = draw.normal(0, 0.1, (rows, rank)).astype(np.float32)
    return tensors


def adapter_config(base: str, rank: int = 4, **changes: Any) -> dict[str, Any]:
    """Make the configuration of such an adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [module.rpartition(".")[2] for module in SHAPES],
        "inference_mode": True,
        **changes,
    }


def write_adapter(
    folder: Path, base: str, *, seed: int = 1, tensors: dict[str, np.ndarray] | None = None, **config: Any
) -> Path:
    """Write an adapter as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = config.get("r", 4)
    save_file(
        tensors if tensors is not None else adapter_tensors(seed, max(1, rank)), folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(base, **config)))
    return folder


def upload_folder(bucket: Bucket, folder: Path, prefix: str) -> None:
    """Put all files of a folder into a bucket."""
    for path in folder.iterdir():
        bucket.client.upload_file(str(path), bucket.name, f"{prefix}/{path.name}")


def publish_adapter(
    storage: Storage, output_uri: str, folder: Path, base: str, *, key: str = "ab" * 8, **document: Any
) -> Published:
    """Publish an adapter as training does, with what its run.json says of the base."""
    output = folder.parent / f"{folder.name}-output"
    (output / "adapter").mkdir(parents=True)
    for path in folder.iterdir():
        (output / "adapter" / path.name).write_bytes(path.read_bytes())
    files = model_files.select_files(base, storage.listing(base))
    model = {"uri": base, "version": model_files.model_version(files)}
    run = {"version": 1, "run": {"method": "LoRA"}, "inputs": {"model": model}, **document}
    (output / "run.json").write_text(json.dumps(run))
    result = Result(key, "feedbeef", "Adapter", "adapter", publish.output_files(output), {"steps": 3})
    return publish.publish(storage, output_uri, result)[0]


def merge_run(endpoint: str | None, *, local: bool = False, stall: str | None = None, **spec: Any) -> MergeRun:
    """Build a run document as the operator does."""
    document: dict[str, Any] = {
        "apiVersion": "tunewright.dev/v1alpha1",
        "kind": "AdapterMerge",
        "metadata": {"name": "support-bot"},
        "spec": spec,
    }
    if stall is not None:
        document["spec"]["retry"] = {"timeouts": {"stall": stall}}
    parsed = parse_adaptermerge(document, local=local)
    storage = StorageSettings(endpoint=endpoint, path_style=True, secret_name="s3-credentials")
    return build_merge_run(parsed.spec, name="support-bot", namespace="ml", attempt=1, storage=storage)


def merge_settings(work: Path, bucket: Bucket | None = None, **changes: Any) -> SupervisorSettings:
    """Build settings; the children find credentials and packages as in the image."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **(bucket.environment if bucket is not None else {}),
        **changes.pop("environment", {}),
    }
    given = {"work": work, "writer": WRITER, "echo": False, "environment": environment}
    return SupervisorSettings(**{**given, **changes})


def write_base(folder: Path, *, hidden: int = HIDDEN, prefix: str = "model", seed: int = 0) -> Path:
    """Write a Llama too small to say anything, for merges that end before it has to."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": hidden, "vocab_size": 96}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(base_tensors(hidden, prefix, seed), folder / "model.safetensors")
    return folder


def base_tensors(hidden: int = HIDDEN, prefix: str = "model", seed: int = 0) -> dict[str, np.ndarray]:
    """Make its weights."""
    draw = np.random.default_rng(seed)
    tensors = {f"{prefix}.embed_tokens.weight": (96, hidden), f"{prefix}.norm.weight": (hidden,)}
    for layer in range(2):
        for module, (rows, columns) in SHAPES.items():
            shape = tuple(hidden if size == HIDDEN else size for size in (rows, columns))
            tensors[f"{prefix}.layers.{layer}.{module}.weight"] = shape
    return {name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in tensors.items()}
