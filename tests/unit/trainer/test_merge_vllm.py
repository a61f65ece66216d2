"""Whether vLLM serves an adapter: what its loader refuses, and what it would take and get wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tunewright_trainer.errors import InvalidAdapter, InvalidConfiguration
from tunewright_trainer.merge.vllm import VllmReport, check_adapter, check_folder

PLAIN = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}
TENSORS = [f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{side}.weight" for n in (0, 1) for side in "AB"]


def report(tensors: list[str] = TENSORS, limit: int = 16, **change: Any) -> VllmReport:
    """Check an adapter that differs from a plain one."""
    return check_adapter({**PLAIN, **change}, tensors, limit)


def test_a_plain_adapter_is_served() -> None:
    """Rank within the limit, factors of layers and embeddings, nothing else; rsLoRA as well."""
    table = "base_model.model.model.embed_tokens"
    embedding = [f"{table}.lora_embedding_A", f"{table}.lora_embedding_B", f"{table}.base_layer.weight"]
    assert report([*TENSORS, *embedding], use_rslora=True) == VllmReport(True, (), 16)


@pytest.mark.parametrize(
    ("change", "limit", "needed", "problem"),
    [
        ({"r": 1}, 16, 1, None),
        ({"r": 8}, 8, 8, None),
        ({"r": 17}, 16, 32, "rank 17 is more than maxLoraRank 16: start vLLM with --max-lora-rank 32"),
        ({"r": 300}, 256, 320, "--max-lora-rank 320"),
        ({"r": 8, "rank_pattern": {"v_proj": 64}}, 16, 64, "rank 64 is more than maxLoraRank 16"),
        ({"r": 600}, 512, None, "rank 600 is more than 512, the most that vLLM serves: merge"),
        ({"r": 0}, 16, None, "rank 0: vLLM takes positive ones"),
    ],
)
def test_ranks(change: dict[str, Any], limit: int, needed: int | None, problem: str | None) -> None:
    """The highest rank of any layer counts, and the limit that it needs is one of those vLLM knows."""
    found = report(TENSORS, limit, **change)
    assert found.max_lora_rank_needed == needed
    assert found.compatible is (problem is None)
    assert problem is None or problem in found.problems[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peft_type": "IA3"}, "LoRA adapters only, this one is of kind 'IA3'"),
        ({"use_dora": True}, "does not serve DoRA"),
        ({"bias": "lora_only"}, "trained biases (bias 'lora_only')"),
        ({"lora_bias": True}, "biases in LoRA layers"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save lm_head, embed_tokens"),
        ({"trainable_token_indices": [5]}, "single tokens"),
        ({"init_lora_weights": "olora"}, "a changed base model (init_lora_weights 'olora')"),
        ({"target_modules": None}, "no target_modules"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 64}}, "give 1 of 2 layers another scale than 2"),
        ({"rank_pattern": {"q_proj": 8}}, "give 2 of 2 layers another scale than 2"),
    ],
)
def test_what_is_not_served(change: dict[str, Any], problem: str) -> None:
    """Each is one problem, with what to do instead."""
    found = report(**change)
    assert not found.compatible
    assert len(found.problems) == 1
    assert problem in found.problems[0]


def test_patterns_without_effect_are_fine() -> None:
    """Rank and alpha that change together leave the scale as it is."""
    assert report(rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 16}).compatible


def test_tensors_decide_as_well() -> None:
    """A saved head or magnitude shows in the file, whatever the configuration says."""
    found = report(
        [*TENSORS, "base_model.model.score.weight", f"{TENSORS[0].rpartition('.lora')[0]}.lora_magnitude_vector"]
    )
    assert len(found.problems) == 1
    assert "base_model.model.score.weight" in found.problems[0]


def test_all_problems_at_once() -> None:
    """Nobody has to try again for the second one."""
    assert len(report(r=64, use_dora=True, bias="all", modules_to_save=["score"]).problems) == 4


def test_a_limit_that_vllm_does_not_know() -> None:
    """It would refuse to start."""
    with pytest.raises(InvalidConfiguration, match="maxLoraRank is 24: vLLM knows 1, 8, 16"):
        report(limit=24)


def test_a_folder(tmp_path: Path) -> None:
    """Configuration and tensor names are read from the files; damaged ones are the adapter's fault."""
    with pytest.raises(InvalidAdapter, match=r"no adapter_config.json: this is not the folder of an adapter"):
        check_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, "r": 32}))
    entries = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in TENSORS}
    header = json.dumps(entries).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert check_folder(tmp_path).max_lora_rank_needed == 32
    assert check_folder(tmp_path, 32).compatible
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors: the safetensors header is damaged"):
        check_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidAdapter, match="not valid JSON"):
        check_folder(tmp_path)
