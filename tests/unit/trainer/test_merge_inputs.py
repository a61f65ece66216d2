"""What a merge refuses: damaged models, damaged adapters, adapters of other models, kinds that are not merged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.merge_files import (
    LORA,
    NORM,
    A,
    B,
    Q,
    Tensors,
    merge_folders,
    normal,
    safetensors,
    write_adapter,
    write_model,
)
from tunewright_trainer.errors import InvalidAdapter, InvalidModel, MissingFile, TrainerError
from tunewright_trainer.merge.adapter import load_adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.readers import FolderReader

BASE: Tensors = {Q: normal(4, 6), NORM: normal(6)}
TRAINED: Tensors = {A: normal(2, 6), B: normal(4, 2)}


def refused(error: type[TrainerError], tmp_path: Path) -> str:
    """Merge tmp_path/adapter into tmp_path/base and return what was wrong; nothing may be written."""
    with pytest.raises(error) as caught:
        merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*")) if (tmp_path / "merged").exists() else True
    return str(caught.value)


def header(entries: dict[str, Any], data: bytes) -> bytes:
    """Build a safetensors file with any header."""
    encoded = json.dumps(entries).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """Build one entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, "no config.json: this is not the folder of a model"),
        ({"config.json": b"{"}, "/config.json: not valid JSON"),
        ({"config.json": b"[]"}, "/config.json: must be a JSON object"),
        ({"model.safetensors": None}, "no model.safetensors: there are config.json, tokenizer.json"),
        (
            {"model.safetensors": None, "pytorch_model.bin": b"x"},
            "the weights are pickles (pytorch_model.bin), which are never loaded",
        ),
        ({"model.safetensors": safetensors(BASE)[:-1]}, "/model.safetensors: truncated: "),
        ({"model.safetensors": b"version https://git-lfs" + b"x" * 110}, "most likely a git-lfs pointer"),
        ({"model.safetensors": header({"a": entry("F32", [1], 4, 8)}, bytes(8))}, "a does not follow its predecessor"),
        ({"model.safetensors": header({"a": entry("F32", [3], 0, 8)}, bytes(8))}, "8 bytes, which is no F32 of shape"),
        (
            {"model.safetensors": header({"a": entry("F4", [2], 0, 8)}, bytes(8))},
            "number format 'F4', which is not known",
        ),
        ({"model.safetensors": header({"a": entry("F32", ["x"], 0, 8)}, bytes(8))}, "damaged at tensor a"),  # type: ignore[list-item]
        ({"model.safetensors.index.json": b"{}"}, "index.json: no weight_map"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'},
            "names ../x.safetensors, which is no model-*.safetensors beside it",
        ),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
            "1 of 1 weight files are missing: model-1.safetensors",
        ),
        (
            {
                "model.safetensors.index.json": b'{"weight_map": {"b": "model-1.safetensors"}}',
                "model-1.safetensors": safetensors({"a": normal(1)}),
            },
            "names tensor b, which model-1.safetensors does not have",
        ),
        (
            {
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
                ).encode(),
                "model-1.safetensors": safetensors({"a": normal(1)}),
                "model-2.safetensors": safetensors({"a": normal(1), "b": normal(1)}),
            },
            "both model-1.safetensors and model-2.safetensors have tensor a",
        ),
        (
            {"config.json": b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'},
            "the weights are quantized by gptq, which nothing is merged into: give the model in 16 bits",
        ),
    ],
)
def test_a_damaged_base_is_refused(tmp_path: Path, files: dict[str, bytes | None], message: str) -> None:
    """The file is named, and what is wrong with it."""
    base = write_model(tmp_path / "base", BASE)
    write_adapter(tmp_path / "adapter", TRAINED)
    for name, content in files.items():
        (base / name).unlink(missing_ok=True)
        if content is not None:
            (base / name).write_bytes(content)
    assert message in refused(InvalidModel, tmp_path)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    """Nothing is there."""
    with pytest.raises(MissingFile, match="no files are there"):
        Checkpoint(FolderReader(tmp_path / "nothing"))


NAN = np.array([[1, np.nan, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {}, "it has no tensors: nothing was trained"),
        ({A: normal(0, 6), B: normal(4, 0)}, {}, f"tensor {A} is empty (shape [0, 6]): rank 0"),
        ({A: normal(2, 6), B: normal(4, 2)}, {"r": 0}, "r is 0: a rank is a whole number above 0"),
        (TRAINED, {"rank_pattern": {"q_proj": 0}}, "rank_pattern q_proj is 0"),
        (TRAINED, {"r": 3}, f"tensor {A} has rank 2, the configuration says 3: the two files do not belong together"),
        ({A: NAN, B: normal(4, 2)}, {}, f"tensor {A} has numbers that are NaN or infinite: its training diverged"),
        ({A: NAN.astype(np.float16), B: normal(4, 2)}, {}, f"tensor {A} has numbers that are NaN"),
        ({A: normal(2, 6), B: np.ones((4, 2), np.int64)}, {}, f"tensor {B} is I64: an adapter's are floats"),
        ({B: normal(4, 2)}, {}, f"of model.layers.0.self_attn.q_proj there is only {B}: tensors are missing"),
        ({"q_proj.lora_A.weight": normal(2, 6)}, {}, "q_proj.lora_A.weight has no name that peft gives"),
        (
            {A: normal(2, 5), B: normal(4, 2)},
            {},
            f"tensor {A} of shape [2, 5] does not fit model.layers.0.self_attn.q_proj.weight of shape [4, 6]",
        ),
        # A and B swapped.
        ({A: normal(2, 4), B: normal(6, 2)}, {}, f"tensor {A} of shape [2, 4] does not fit"),
        ({A: normal(2, 6), B: normal(8, 2)}, {}, "was trained on another model (hf://org/base)"),
        (
            {name.replace("layers.0", "layers.7"): tensor for name, tensor in TRAINED.items()},
            {},
            "is one for model.layers.7.self_attn.q_proj.weight, which ",
        ),
        (
            {**TRAINED, "base_model.model.score.weight": normal(2, 6)},
            {},
            "base_model.model.score.weight is one for score.weight, which ",
        ),
        (
            {**TRAINED, "base_model.model.model.norm.weight": normal(5)},
            {"modules_to_save": ["norm"]},
            "model.norm.weight of shape [5]",
        ),
        (
            {**TRAINED, f"{B.removesuffix('.weight')}.bias": normal(4)},
            {"lora_bias": True},
            "is one for model.layers.0.self_attn.q_proj.bias, which ",
        ),
        (
            {"base_model.model.model.embed.token_adapter.trainable_tokens_delta": normal(1, 6)},
            {},
            "is one for model.embed.weight, which ",
        ),
        (
            {f"base_model.model.{Q.removesuffix('.weight')}.token_adapter.trainable_tokens_delta": normal(1, 6)},
            {},
            "the configuration does not say which tokens",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any], message: str
) -> None:
    """The tensor is named, with the shapes and the model that the adapter says it belongs to."""
    write_model(tmp_path / "base", BASE)
    write_adapter(tmp_path / "adapter", tensors, config)
    text = refused(InvalidAdapter, tmp_path)
    assert message in text
    assert text.startswith(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of type 'PREFIX_TUNING' cannot be merged here: it adds keys"),
        ({"peft_type": "PROMPT_TUNING"}, "use base and adapter together"),
        ({"peft_type": "LOHA"}, "an adapter of type 'LOHA' cannot be merged here: merge it with peft itself"),
        ({"peft_type": None}, "an adapter of type None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': such an adapter belongs to"),
        ({"init_lora_weights": "loftq"}, "belongs to a base whose weights were changed"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set: activated LoRA"),
        ({"use_qalora": True}, "QALoRA cannot be merged here"),
        ({"layer_replication": [[0, 2]]}, "layer replication, which makes a model with other layers"),
    ],
)
def test_a_kind_that_is_not_merged_is_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    """The message says what it is and what to do."""
    folder = write_adapter(tmp_path / "adapter", TRAINED, config)
    with pytest.raises(InvalidAdapter) as caught:
        load_adapter(folder, "s3://bucket/adapter")
    assert message in str(caught.value)
    assert str(caught.value).startswith("s3://bucket/adapter/adapter_config.json: ")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_harmless_starts_are_merged(tmp_path: Path, start: bool | str) -> None:
    """A way to draw the first weights that leaves the base alone does not matter."""
    load_adapter(write_adapter(tmp_path / "adapter", TRAINED, {"init_lora_weights": start}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": None}, "no adapter_config.json: this is not the folder of an adapter"),
        ({"adapter_config.json": b"{"}, "/adapter_config.json: not valid JSON"),
        ({"adapter_model.safetensors": None}, "no adapter_model.safetensors"),
        (
            {"adapter_model.safetensors": None, "adapter_model.bin": b"x"},
            "adapter_model.bin is a pickle, which is never loaded",
        ),
        ({"adapter_model.safetensors": safetensors(TRAINED)[:-4]}, "adapter_model.safetensors: truncated"),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, files: dict[str, bytes | None], message: str) -> None:
    """The file is named, and what is wrong with it."""
    folder = write_adapter(tmp_path / "adapter", TRAINED)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(InvalidAdapter) as caught:
        load_adapter(folder)
    assert message in str(caught.value)


def test_two_versions_of_one_tensor_are_refused(tmp_path: Path) -> None:
    """Which of them was trained cannot be told."""
    write_model(tmp_path / "base", BASE)
    norm = "base_model.model.model.norm"
    write_adapter(
        tmp_path / "adapter",
        {f"{norm}.weight": normal(6), f"{norm}.modules_to_save.weight": normal(6, seed=1)},
        {"modules_to_save": ["norm"]},
    )
    assert "are two versions of model.norm.weight" in refused(InvalidAdapter, tmp_path)


def test_scales_come_from_the_configuration(tmp_path: Path) -> None:
    """alpha / r, with patterns for some modules; alpha / sqrt(r) with rsLoRA."""
    config = {**LORA, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.*": 32}}
    adapter = load_adapter(write_adapter(tmp_path / "adapter", TRAINED, config))
    assert adapter.scale_of("model.layers.0.self_attn.q_proj") == 4 / 8
    assert adapter.scale_of("model.layers.1.mlp.up_proj") == 32 / 2
    assert adapter.scale_of("model.layers.11.mlp.up_proj") == 4 / 2
    stabilised = load_adapter(write_adapter(tmp_path / "rs", TRAINED, {"use_rslora": True, "r": 4}))
    assert stabilised.scale_of("anything") == 4 / 2
