"""A merge by numbers: shards, formats, blocks, what is copied and what changed, what is written beside the weights."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.merge_files import (
    NORM,
    A,
    B,
    Q,
    Tensors,
    merge_folders,
    normal,
    read_file,
    read_folder,
    write_adapter,
    write_model,
)
from tunewright_trainer.errors import Preempted, VerificationFailed
from tunewright_trainer.merge import compute, prefetch
from tunewright_trainer.merge.numbers import from_float32, to_float32
from tunewright_trainer.merge.readers import FolderReader
from tunewright_trainer.transfer import Stop

K = "model.layers.0.self_attn.k_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
TRAINED: dict[str, Any] = {A: normal(2, 6, seed=1), B: normal(4, 2, seed=2)}
DELTA = 2 * TRAINED[B] @ TRAINED[A]


def halves(array: Any) -> tuple[str, Any]:
    """Return an array in bfloat16."""
    return "BF16", from_float32(array, "BF16")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter for one layer."""
    return write_adapter(tmp_path / "adapter", TRAINED)


def bytes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_delta_is_added_and_the_rest_copied(tmp_path: Path, adapter: Path) -> None:
    """One tensor changes, all others keep their bytes; the findings say by how much."""
    base: dict[str, Any] = {Q: normal(4, 6), K: normal(4, 6), "positions": np.arange(5), NORM: normal(6)}
    write_model(tmp_path / "base", base)
    findings = merge_folders(tmp_path / "base", adapter, tmp_path / "merged")
    merged = read_file(tmp_path / "merged/model.safetensors")
    np.testing.assert_allclose(merged[Q], base[Q] + DELTA, rtol=1e-6)
    for name in (K, "positions", NORM):
        assert np.array_equal(merged[name], base[name])
    (change,) = findings.changes
    assert (change.name, change.changed, change.kind) == (Q, True, "Delta")
    assert change.relative_delta == pytest.approx(np.linalg.norm(DELTA) / np.linalg.norm(base[Q]), rel=1e-5)
    assert (findings.adapter_tensors, findings.copied_tensors, findings.converted_tensors) == (2, 3, 0)
    assert {file.name: file.sha256 for file in findings.files} == bytes_of(tmp_path / "merged")
    assert {file.name: file.bytes for file in findings.files} == dict(FolderReader(tmp_path / "merged").files)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("BFloat16", "BF16"), ("Float16", "F16"), ("Float32", "F32"), ("Auto", "BF16")]
)
def test_there_is_one_rounding(tmp_path: Path, adapter: Path, dtype: Any, stored: str) -> None:
    """The sum is made in float32 and rounded once to the output's format; integers stay what they are."""
    base: dict[str, Any] = {Q: halves(normal(4, 6)), NORM: halves(normal(6)), "positions": np.arange(5)}
    write_model(tmp_path / "base", base, config={"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}})
    findings = merge_folders(tmp_path / "base", adapter, tmp_path / "merged", dtype=dtype)
    merged = read_file(tmp_path / "merged/model.safetensors")
    for name, delta in ((Q, DELTA), (NORM, np.float32(0))):
        exact = to_float32(base[name][1], "BF16") + delta
        assert np.array_equal(merged[name], to_float32(from_float32(exact, stored), stored)), name
    assert np.array_equal(merged["positions"], np.arange(5))
    config = json.loads((tmp_path / "merged/config.json").read_text())
    expected = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[stored]
    assert (config["dtype"], config["text_config"]["torch_dtype"]) == (expected, expected)
    assert findings.converted_tensors == (stored != "BF16")


def test_blocks_and_spans_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the same, byte for byte, however tensors are cut for reading and for computing."""
    base: dict[str, Any] = {EMBEDDING: halves(normal(50, 8)), Q: halves(normal(33, 8)), NORM: halves(normal(8))}
    write_model(tmp_path / "base", base)
    prefix = "base_model.model.model.embed_tokens"
    trained = {
        A: normal(2, 8),
        B: normal(33, 2),
        f"{A.removesuffix('.lora_A.weight')}.lora_magnitude_vector": 1 + normal(33),
        f"{prefix}.lora_embedding_A": normal(2, 50),
        f"{prefix}.lora_embedding_B": normal(8, 2),
        f"{prefix}.lora_magnitude_vector": 1 + normal(8),
    }
    adapter = write_adapter(tmp_path / "adapter", trained, {"task_type": "FEATURE_EXTRACTION"})
    merge_folders(tmp_path / "base", adapter, tmp_path / "whole")
    for span, block in ((64, 16), (1, 1), (160, 1000)):
        monkeypatch.setattr(compute, "SPAN_BYTES", span)
        monkeypatch.setattr(prefetch, "SPAN_BYTES", span)
        monkeypatch.setattr(prefetch, "AHEAD_BYTES", 2 * span)
        monkeypatch.setattr(compute, "_COMPUTED_ELEMENTS", block)
        merge_folders(tmp_path / "base", adapter, tmp_path / f"cut-{span}")
        got = read_folder(tmp_path / f"cut-{span}")
        for name, expected in read_folder(tmp_path / "whole").items():
            np.testing.assert_allclose(got[name], expected, rtol=2**-8, err_msg=name)


def test_a_second_merge_gives_the_same_bytes(tmp_path: Path, adapter: Path) -> None:
    """Nothing of the result depends on time or order."""
    write_model(tmp_path / "base", {Q: halves(normal(4, 6))}, {K: halves(normal(400, 6)), NORM: halves(normal(6))})
    merge_folders(tmp_path / "base", adapter, tmp_path / "one", max_shard_bytes=1000)
    merge_folders(tmp_path / "base", adapter, tmp_path / "two", max_shard_bytes=1000)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (10**9, ["model.safetensors"]),
        (200, [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]),
        (1, [f"model-{n:05}-of-00004.safetensors" for n in (1, 2, 3, 4)]),
    ],
)
def test_shards(tmp_path: Path, adapter: Path, limit: int, files: list[str]) -> None:
    """Files are filled in the base's order up to the limit; an index names every tensor's file and the sum of bytes."""
    base: dict[str, Any] = {Q: normal(4, 6), K: normal(4, 6), NORM: normal(6), "positions": np.arange(3)}
    write_model(tmp_path / "base", {Q: base[Q], K: base[K]}, {NORM: base[NORM], "positions": base["positions"]})
    findings = merge_folders(tmp_path / "base", adapter, tmp_path / "merged", max_shard_bytes=limit)
    assert [file.name for file in findings.files if file.name.endswith(".safetensors")] == files
    assert sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors")) == files
    assert read_folder(tmp_path / "merged").keys() == base.keys()
    index = tmp_path / "merged/model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(a.nbytes for a in base.values())


def test_wide_numbers_come_first_in_a_file(tmp_path: Path, adapter: Path) -> None:
    """Tensors lie at multiples of the size of their numbers, which loaders that map files need."""
    write_model(tmp_path / "base", {"flags": np.zeros(3, np.uint8), Q: halves(normal(4, 6)), "positions": np.arange(3)})
    merge_folders(tmp_path / "base", adapter, tmp_path / "merged")
    data = (tmp_path / "merged/model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    sizes = {"I64": 8, "BF16": 2, "U8": 1}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    """A delta of 0, or one too small for the number format, leaves a targeted tensor as it was: the gate decides."""
    write_model(tmp_path / "base", {Q: halves(1 + normal(4, 6)), K: halves(1 + normal(4, 6))})
    names = [name.replace("q_proj", "k_proj") for name in (A, B)]
    tiny = np.full((4, 2), 1e-6, np.float32)
    trained = {A: normal(2, 6), B: np.zeros((4, 2), np.float32), names[0]: normal(2, 6), names[1]: tiny}
    findings = merge_folders(tmp_path / "base", write_adapter(tmp_path / "adapter", trained), tmp_path / "merged")
    assert findings.unchanged == (Q, K)
    assert findings.changes[0].relative_delta == 0
    assert 0 < findings.changes[1].relative_delta < 1e-4
    assert (tmp_path / "merged/model.safetensors").read_bytes()[-96:] == (
        tmp_path / "base/model.safetensors"
    ).read_bytes()[-96:]


def test_a_bias_of_zeros_cannot_change(tmp_path: Path) -> None:
    """IA3 multiplies the bias of a layer as well; one that is 0 everywhere stays 0, which is no fault."""
    bias = f"{Q.removesuffix('weight')}bias"
    write_model(tmp_path / "base", {Q: normal(4, 6), bias: np.zeros(4, np.float32)})
    trained = {f"base_model.model.{Q.removesuffix('.weight')}.ia3_l": 1 + normal(4, 1)}
    adapter = write_adapter(tmp_path / "adapter", trained, {"peft_type": "IA3"})
    findings = merge_folders(tmp_path / "base", adapter, tmp_path / "merged")
    assert [change.name for change in findings.changes] == [Q]
    assert findings.unchanged == ()


@pytest.mark.parametrize(
    ("base", "trained", "dtype", "name"),
    [
        # Finite in float32, not in float16.
        ({Q: normal(4, 6) + 60000}, {A: normal(2, 6) + 100, B: normal(4, 2) + 100}, "Float16", Q),
        ({Q: np.full((4, 6), 3e38, np.float32)}, {A: 1e19 + normal(2, 6), B: 1e19 + normal(4, 2)}, "Auto", Q),
        ({Q: normal(4, 6), NORM: np.array([1, np.nan], np.float32)}, TRAINED, "Auto", NORM),
        ({Q: normal(4, 6), NORM: np.array([1, np.inf], np.float32)}, TRAINED, "BFloat16", NORM),
        ({Q: np.full((4, 6), np.nan, np.float32)}, TRAINED, "Auto", Q),
    ],
)
def test_a_result_that_is_not_finite_is_named(
    tmp_path: Path, base: Tensors, trained: Tensors, dtype: Any, name: str
) -> None:
    """Overflow, and numbers of the base that were damaged before, end the merge with the name of the tensor."""
    write_model(tmp_path / "base", base)
    adapter = write_adapter(tmp_path / "adapter", trained)
    with pytest.raises(VerificationFailed, match=f"tensor {name} of the merged model has numbers that are NaN"):
        merge_folders(tmp_path / "base", adapter, tmp_path / "merged", dtype=dtype)
    assert not list((tmp_path / "merged").iterdir())


def test_a_full_disk(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own error comes through, and no half file stays."""
    write_model(tmp_path / "base", {Q: normal(4, 6)})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        merge_folders(tmp_path / "base", adapter, tmp_path / "merged")
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "merged").iterdir())


def test_a_stop_ends_a_merge(tmp_path: Path, adapter: Path) -> None:
    """A request to stop is looked at between blocks."""
    write_model(tmp_path / "base", {Q: normal(4, 6)})
    stop = Stop()
    stop.request("SIGTERM")
    with pytest.raises(Preempted):
        merge_folders(tmp_path / "base", adapter, tmp_path / "merged", stop=stop)
    assert not list((tmp_path / "merged").iterdir())


def test_progress_is_told_in_bytes(tmp_path: Path, adapter: Path) -> None:
    """What is told adds up to the weight files."""
    write_model(tmp_path / "base", {Q: normal(4, 6)}, {K: normal(4, 6), NORM: normal(6)})
    told: list[int] = []
    findings = merge_folders(tmp_path / "base", adapter, tmp_path / "merged", advance=told.append, max_shard_bytes=100)
    assert sum(told) == sum(file.bytes for file in findings.files if file.name.endswith(".safetensors"))


def test_small_files(tmp_path: Path, adapter: Path) -> None:
    """The adapter's tokenizer goes before the base's; code, pickles and other weights stay where they are."""
    base = write_model(tmp_path / "base", {Q: normal(4, 6)}, config={"use_cache": True})
    for name in ("generation_config.json", "chat_template.jinja", "added_tokens.json", "merges.txt", "tokenizer.model"):
        (base / name).write_text(f"base {name}")
    for name in ("modeling.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "README.md", "x.gguf"):
        (base / name).write_text("no")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_text(f"adapter {name}")
    (adapter / "trainer_state.json").write_text("no")
    merge_folders(base, adapter, tmp_path / "merged")
    merged = {path.name: path for path in (tmp_path / "merged").iterdir()}
    assert merged.keys() == {
        *("config.json", "generation_config.json", "chat_template.jinja", "merges.txt", "tokenizer.model"),
        *("tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    }
    assert merged["chat_template.jinja"].read_text() == "adapter chat_template.jinja"
    assert merged["generation_config.json"].read_text() == "base generation_config.json"
    assert json.loads(merged["config.json"].read_text()) == {"model_type": "llama", "use_cache": True}


def test_a_tokenizer_that_was_not_trained_with_is_the_bases(tmp_path: Path, adapter: Path) -> None:
    """An adapter without a tokenizer takes that of its base, chat template included."""
    base = write_model(tmp_path / "base", {Q: normal(4, 6)})
    (base / "chat_template.jinja").write_text("base")
    (base / "special_tokens_map.json").write_text("{}")
    merge_folders(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged/chat_template.jinja").read_text() == "base"
    assert (tmp_path / "merged/special_tokens_map.json").exists()


def test_a_classifier_gets_the_token_that_training_padded_with(tmp_path: Path) -> None:
    """Without it a classifier takes no batches; training set it to the tokenizer's."""
    write_model(tmp_path / "base", {Q: normal(4, 6)}, config={"architectures": ["LlamaForCausalLM"]})
    head = {"base_model.model.score.weight": normal(3, 6)}
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    adapter = write_adapter(tmp_path / "adapter", {**TRAINED, **head}, config)
    (adapter / "tokenizer_config.json").write_text('{"pad_token": "<end>"}')
    (adapter / "tokenizer.json").write_text('{"added_tokens": [{"id": 7, "content": "<end>"}]}')
    findings = merge_folders(tmp_path / "base", adapter, tmp_path / "merged", outputs=["a", "b", "c"])
    assert json.loads((tmp_path / "merged/config.json").read_text()) == {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
        "pad_token_id": 7,
    }
    added = next(change for change in findings.changes if change.name == "score.weight")
    assert (added.kind, added.relative_delta) == ("Added", math.inf)


def test_empty_tensors_and_numbers_without_dimensions(tmp_path: Path, adapter: Path) -> None:
    """Rare shapes go through."""
    base: dict[str, Any] = {Q: normal(4, 6), "empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5, np.float32)}
    write_model(tmp_path / "base", base)
    merge_folders(tmp_path / "base", adapter, tmp_path / "merged", dtype="BFloat16")
    merged = read_file(tmp_path / "merged/model.safetensors")
    assert merged["empty"].shape == (0, 3)
    assert merged["scalar"] == 2.5


def test_the_files_are_plain_safetensors(tmp_path: Path, adapter: Path) -> None:
    """The safetensors library reads what is written."""
    from safetensors.numpy import load_file

    write_model(tmp_path / "base", {Q: normal(4, 6), NORM: normal(6)})
    merge_folders(tmp_path / "base", adapter, tmp_path / "merged")
    assert load_file(tmp_path / "merged/model.safetensors").keys() == {Q, NORM}
