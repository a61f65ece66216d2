"""Our merge against peft's, for every kind of adapter that is merged: same tensors, same logits, same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, TrainableTokensConfig

from tests.trainer.merge_kit import assert_equal_to_peft, load, make_base, run_case

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models by name, made when they are first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, key: str) -> Path:
            name, _, kind = key.partition("/")
            folder = tmp_path_factory.mktemp("bases") / key.replace("/", "-")
            self[key] = make_base(folder, name, kind or "CAUSAL_LM")
            return self[key]

    return Made()


def lora(targets: Any = LINEAR, **changes: Any) -> LoraConfig:
    """Build a LoRA configuration."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets, **changes})


CASES: dict[str, tuple[str, PeftConfig]] = {
    "lora": ("llama", lora()),
    "patterns": (
        "llama",
        lora(rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6}, alpha_pattern={"k_proj": 32, "^.*up_proj": 2}),
    ),
    "rslora": ("llama", lora(use_rslora=True)),
    "dora": ("llama", lora(use_dora=True)),
    "bias-lora-only": ("llama", lora(["q_proj", "o_proj"], bias="lora_only")),
    "bias-all": ("llama", lora(["q_proj"], bias="all")),
    "lora-bias": ("llama", lora(["q_proj", "v_proj"], lora_bias=True)),
    "embedding": ("llama", lora(["embed_tokens", "q_proj"])),
    "embedding-dora": ("llama", lora(["embed_tokens", "q_proj"], use_dora=True)),
    "head": ("llama", lora(["lm_head", "q_proj"])),
    "modules-to-save": ("llama", lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "norms-to-save": ("llama", lora(["q_proj"], modules_to_save=["input_layernorm"])),
    "tokens": ("llama", lora(["q_proj"], trainable_token_indices=[3, 47, 11])),
    "tokens-by-name": ("llama", lora(["q_proj"], trainable_token_indices={"embed_tokens": [3], "lm_head": [5, 3]})),
    "only-tokens": ("llama", TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1, 40])),
    "ia3": (
        "llama",
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "qwen2": ("qwen2", lora()),
    "qwen2-tokens": ("qwen2", lora(["q_proj"], trainable_token_indices=[3, 47])),
    "qwen2-ia3": (
        "qwen2",
        IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "qwen2-tied-whole": ("qwen2", lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "gpt2": ("gpt2", lora(["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2-dora": ("gpt2", lora(["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
    "gpt2-bias": ("gpt2", lora(["c_attn"], fan_in_fan_out=True, bias="all")),
    "gpt2-ia3": (
        "gpt2",
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "mixtral-attention": ("mixtral", lora(["q_proj", "v_proj"])),
    "mixtral-experts": (
        "mixtral",
        lora(["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "mixtral-router": ("mixtral", lora(["q_proj"], target_parameters=["mlp.gate.weight"])),
    "qwen3-moe-experts": (
        "qwen3_moe",
        lora(
            ["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"experts.down_proj": 2},
        ),
    ),
    "qwen3-moe-down": ("qwen3_moe", lora(["o_proj"], target_parameters=["experts.down_proj"])),
    "gpt-oss-experts": (
        "gpt_oss",
        lora(["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_merge_equals_pefts(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Every tensor is peft's within 1e-5, the logits are those of base and adapter, and transformers misses nothing."""
    base, config = CASES[name]
    case = run_case(bases[base], tmp_path, config)
    assert_equal_to_peft(case)
    assert case.findings.unchanged == ()
    assert case.findings.adapter_tensors > 0


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "gpt2", "qwen3-moe-experts", "modules-to-save"])
def test_a_merge_in_16_bits_is_rounded_once(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """In bfloat16 every number is the nearest one to peft's float32 result, or, where that is near the middle of two,
    its neighbour."""
    base, config = CASES[name]
    case = run_case(bases[base], tmp_path, config, dtype="BFloat16")
    merged = load(case.merged, dtype=torch.bfloat16).state_dict()
    for key, exact in case.reference.items():
        ours, nearest = merged[key], exact.to(torch.bfloat16)
        steps = (ours.view(torch.int16).int() - nearest.view(torch.int16).int()).abs()
        assert steps.max() <= 1, key
        assert (steps > 0).float().mean() < 0.001, key
    assert case.config()["dtype"] == "bfloat16"
    assert case.findings.unchanged == ()


def test_a_merge_does_not_depend_on_the_files(bases: dict[str, Path], tmp_path: Path) -> None:
    """A base in many shards gives the tensors that one in a single file gives, and has an index that loads."""
    base, config = CASES["patterns"]
    one = run_case(bases[base], tmp_path / "one", config)
    sharded = make_base(tmp_path / "base", "llama", max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").exists()
    many = run_case(sharded, tmp_path / "many", config, max_shard_bytes=20_000)
    assert (many.merged / "model.safetensors.index.json").exists()
    expected = load(one.merged).state_dict()
    for name, tensor in assert_equal_to_peft(many).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
