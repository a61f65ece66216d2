"""Target presets on real architectures, built without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    RobertaConfig,
)

from tunewright_api.defaults import ResolvedLoRA
from tunewright_trainer.adapter import linear_layers, lora_config
from tunewright_trainer.targets import resolve_preset

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
LLAMA_LIKE: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 1}
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
ALL = sorted([*ATTENTION, "down_proj", "gate_proj", "up_proj"])
CASES: dict[str, tuple[PretrainedConfig, dict[Any, list[str]]]] = {
    name: (config, {"AllLinear": ALL, "Attention": ATTENTION, "QueryValue": ["q_proj", "v_proj"]})
    for name, config in {
        "llama": LlamaConfig(**LLAMA_LIKE),
        "mistral": MistralConfig(**LLAMA_LIKE),
        "qwen3": Qwen3Config(**LLAMA_LIKE),
        "gemma2": Gemma2Config(**LLAMA_LIKE),
    }.items()
} | {
    "phi3": (
        Phi3Config(**LLAMA_LIKE, pad_token_id=0),
        {
            "AllLinear": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
            "Attention": ["o_proj", "qkv_proj"],
            "QueryValue": ["qkv_proj"],
        },
    ),
    "gpt2": (
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64),
        {
            "AllLinear": ["c_attn", "c_fc", "c_proj"],
            "Attention": ["attn.c_proj", "c_attn"],
            "QueryValue": ["c_attn"],
        },
    ),
    "falcon": (
        FalconConfig(**SMALL),
        {
            "AllLinear": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
            "Attention": ["dense", "query_key_value"],
            "QueryValue": ["query_key_value"],
        },
    ),
    "gpt-neox": (
        GPTNeoXConfig(**SMALL, intermediate_size=64),
        {
            "AllLinear": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
            "Attention": ["dense", "query_key_value"],
            "QueryValue": ["query_key_value"],
        },
    ),
    "bert": (
        BertConfig(**SMALL, intermediate_size=64, is_decoder=True),
        {
            "Attention": ["attention.output.dense", "key", "query", "value"],
            "QueryValue": ["query", "value"],
        },
    ),
    "roberta": (
        RobertaConfig(**SMALL, intermediate_size=64, is_decoder=True),
        {
            "Attention": ["attention.output.dense", "key", "query", "value"],
            "QueryValue": ["query", "value"],
        },
    ),
}


@pytest.mark.parametrize("architecture", CASES)
def test_presets_of_an_architecture(architecture: str) -> None:
    """Presets resolve to the layers of each family, and peft puts the adapter on exactly those."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    config, presets = CASES[architecture]
    for preset, expected in presets.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = list(linear_layers(model))
        assert resolve_preset(preset, layers) == expected
        lora = ResolvedLoRA(rank=2, alpha=4, dropout=0.0, targets=preset, target_modules=None)
        adapted = get_peft_model(model, lora_config(model, lora, revision=None), low_cpu_mem_usage=True)
        found = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
        chosen = {n for n in layers if any(n == t or n.endswith("." + t) for t in expected)}
        assert found == chosen


def test_output_head_is_never_chosen() -> None:
    """AllLinear leaves the head alone, whatever it is called."""
    with torch.device("meta"):
        gpt_neox = AutoModelForCausalLM.from_config(CASES["gpt-neox"][0])
    assert not any("embed_out" in name for name in linear_layers(gpt_neox))
