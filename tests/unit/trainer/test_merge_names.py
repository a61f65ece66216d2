"""Names of an adapter's tensors, and the tensors of files that they mean."""

from __future__ import annotations

import pytest

from tunewright_trainer.merge.names import UNTRAINED, Key, Names, parse_key

P = "base_model.model."


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (f"{P}model.layers.0.q_proj.lora_A.weight", Key("model.layers.0.q_proj", "lora_A", 0)),
        (f"{P}model.layers.0.q_proj.lora_B.bias", Key("model.layers.0.q_proj", "lora_B.bias", 0)),
        (f"{P}q_proj.lora_magnitude_vector", Key("q_proj", "lora_magnitude_vector", 0)),
        (f"{P}q_proj.lora_magnitude_vector.weight", Key("q_proj", "lora_magnitude_vector", 0)),
        (f"{P}wte.lora_embedding_A", Key("wte", "lora_embedding_A", 0)),
        (f"{P}wte.token_adapter.trainable_tokens_delta", Key("wte", "trainable_tokens_delta", 0)),
        (f"{P}wte.trainable_tokens_delta", Key("wte", "trainable_tokens_delta", 0)),
        (f"{P}wte.token_adapter.base_layer.lora_embedding_B", Key("wte", "lora_embedding_B", 0)),
        (f"{P}mlp.experts.base_layer.lora_A.weight", Key("mlp.experts", "lora_A", 1)),
        (f"{P}k_proj.ia3_l", Key("k_proj", "ia3_l", 0)),
        (f"{P}q_proj.base_layer.bias", Key("q_proj.bias", "", 0)),
        (f"{P}wte.token_adapter.base_layer.weight", Key("wte.weight", "", 0)),
        (f"{P}wte.modules_to_save.weight", Key("wte.weight", "", 0)),
        (f"{P}wte.original_module.weight", Key("wte.original_module.weight", UNTRAINED, 0)),
        (f"{P}score.weight", Key("score.weight", "", 0)),
        ("prompt_embeddings", None),
    ],
)
def test_a_name_is_taken_apart(name: str, key: Key | None) -> None:
    """What peft appends to a module's name says what the tensor is."""
    assert parse_key(name) == key


@pytest.mark.parametrize(
    ("path", "tensor"),
    [
        ("model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("transformer.h.0.attn.weight", "h.0.attn.weight"),
        ("layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.vision_tower.patch.weight", "vision_tower.patch.weight"),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("bert.embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("model.layers.1.q_proj.weight", None),
    ],
)
def test_a_parameter_is_found_under_the_name_that_files_have(path: str, tensor: str | None) -> None:
    """Heads, prefixes and old names differ between the loaded model and its files."""
    names = Names(
        [
            "model.layers.0.q_proj.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
            "h.0.attn.weight",
            "language_model.model.norm.weight",
            "language_model.lm_head.weight",
            "vision_tower.patch.weight",
            "embeddings.LayerNorm.gamma",
            "cls.predictions.bias",
        ]
    )
    assert names.find(path) == tensor


@pytest.mark.parametrize(
    ("container", "parts"),
    [("mlp.experts", ("gate_proj", "up_proj")), ("block_sparse_moe.experts", ("w1", "w3"))],
)
def test_stacked_experts_are_found_one_by_one(container: str, parts: tuple[str, str]) -> None:
    """Models stack the experts that files keep apart; gate and up come in the order in which they are stacked."""
    names = Names(f"model.layers.0.{container}.{n}.{part}.weight" for n in range(12) for part in parts)
    found = names.find_experts("model.layers.0.mlp.experts.gate_up_proj")
    assert found is not None
    assert list(found) == list(range(12))
    assert found[11] == tuple(f"model.layers.0.{container}.11.{part}.weight" for part in parts)
    assert names.find_experts("model.layers.0.mlp.experts.down_proj") is None
