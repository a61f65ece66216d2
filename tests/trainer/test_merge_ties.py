"""Models whose input embedding and output head are one tensor: when they stay one, and when the merge parts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.trainer.merge_kit import assert_equal_to_peft, load, make_base, merge_folders, run_case
from tunewright_trainer.errors import InvalidAdapter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2, tied."""
    return make_base(tmp_path_factory.mktemp("tied") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, not tied."""
    return make_base(tmp_path_factory.mktemp("untied") / "llama", "llama")


def lora(targets: list[str], **changes: object) -> LoraConfig:
    """Build a LoRA configuration."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets, **changes})


@pytest.mark.parametrize(
    ("config", "parted", "same_weights"),
    [
        (lora(["q_proj"]), False, True),
        (lora(["q_proj"], trainable_token_indices=[4]), False, True),
        (lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), False, True),
        # peft adds the delta to the one tensor twice.
        (lora(["q_proj", "embed_tokens"], ensure_weight_tying=True), False, False),
        (lora(["q_proj"], modules_to_save=["embed_tokens"]), True, True),
        (lora(["q_proj"], modules_to_save=["lm_head"]), True, True),
        (lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"]), True, True),
        # peft adds the delta to the one tensor, though the adapter acts on one of its two uses.
        (lora(["q_proj", "embed_tokens"]), True, False),
        (lora(["q_proj", "lm_head"]), True, False),
        (lora(["q_proj", "lm_head", "embed_tokens"]), True, False),
        (lora(["lm_head", "q_proj"], use_dora=True), True, False),
    ],
    ids=lambda value: None if isinstance(value, bool) else "-".join(sorted(value.target_modules)),
)
def test_a_head_gets_a_tensor_when_it_needs_one(
    tied: Path, tmp_path: Path, config: LoraConfig, parted: bool, same_weights: bool
) -> None:
    """Only what the adapter changes differently becomes two tensors, and the configuration says so; the logits are
    those of base and adapter in any case."""
    case = run_case(tied, tmp_path, config)
    assert_equal_to_peft(case, same_weights=same_weights)
    assert (HEAD in load_file(case.merged / "model.safetensors")) == parted
    assert case.config()["tie_word_embeddings"] == (not parted)
    assert case.findings.untied == parted
    assert case.findings.unchanged == ()


def test_a_head_in_the_file_of_a_tied_model_follows_its_embedding(tied: Path, tmp_path: Path) -> None:
    """Some files have the one tensor twice; both get the change, so that it does not matter which one is loaded."""
    model = load(tied)
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tied / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    case = run_case(tmp_path / "base", tmp_path, lora(["q_proj"], trainable_token_indices=[4]))
    merged = load_file(case.merged / "model.safetensors")
    assert torch.equal(merged[HEAD], merged[EMBEDDING])
    assert not torch.equal(merged[HEAD], tensors[EMBEDDING])
    assert_equal_to_peft(case)


def grow(model: PreTrainedModel) -> None:
    """Add two tokens."""
    torch.manual_seed(5)
    model.resize_token_embeddings(50, mean_resizing=False)


@pytest.mark.parametrize("family", ["tied", "untied"])
@pytest.mark.parametrize(
    "config",
    [
        lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        lora(["q_proj"], modules_to_save=["embed_tokens"]),
        lora(["q_proj", "embed_tokens", "lm_head"]),
        lora(["q_proj"], trainable_token_indices=[49, 3]),
    ],
    ids=["whole", "embedding", "lora", "tokens"],
)
def test_a_grown_vocabulary(request: pytest.FixtureRequest, tmp_path: Path, family: str, config: LoraConfig) -> None:
    """Added tokens are in embedding, head and configuration of the merged model."""
    base: Path = request.getfixturevalue(family)
    case = run_case(base, tmp_path, config, before=grow)
    assert case.config()["vocab_size"] == 50
    merged = assert_equal_to_peft(case, same_weights=family == "untied")
    for layer in (merged.get_input_embeddings(), merged.get_output_embeddings()):
        assert len(layer.weight) == 50  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "lost", "message"),
    [
        (
            lora(["q_proj"], modules_to_save=["embed_tokens"]),
            "lm_head",
            r"the embedding has 50 tokens, the output head lm_head\.weight has 48: train the adapter with",
        ),
        (
            lora(["q_proj"], trainable_token_indices=[49]),
            "base_layer",
            r"trainable_tokens_delta of shape \[1, 32\] does not fit model\.embed_tokens\.weight of shape \[48, 32\]",
        ),
        (
            lora(["q_proj", "embed_tokens", "lm_head"]),
            "base_layer",
            r"lm_head\.lora_B\.weight of shape \[50, 4\] does not fit lm_head\.weight of shape \[48, 32\]",
        ),
    ],
)
def test_a_grown_vocabulary_of_which_a_part_is_lost(
    untied: Path, tmp_path: Path, config: LoraConfig, lost: str, message: str
) -> None:
    """An adapter needs all of the grown tensors; the message says which do not fit."""
    case = run_case(untied, tmp_path, config, before=grow)
    weights = case.adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if lost not in name}, weights)
    with pytest.raises(InvalidAdapter, match=message):
        merge_folders(untied, case.adapter, tmp_path / "again")


def test_weights_that_other_modules_share_too_are_refused(tied: Path, tmp_path: Path) -> None:
    """Of an encoder-decoder, one tensor cannot become three: it is refused with what to do."""
    case = run_case(tied, tmp_path, lora(["q_proj", "embed_tokens"]))
    config = {**json.loads((tied / "config.json").read_text()), "is_encoder_decoder": True}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").symlink_to(tied / "model.safetensors")
    with pytest.raises(InvalidAdapter, match="ensure_weight_tying"):
        merge_folders(other, case.adapter, tmp_path / "again")
