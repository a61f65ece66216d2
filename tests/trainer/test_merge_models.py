"""Merges into models of other tasks and into files with other names than the loaded model has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.trainer.merge_kit import adapt, assert_equal_to_peft, load, logits, make_base, merge_folders, quiet, run_case


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT for masked tokens."""
    return make_base(tmp_path_factory.mktemp("bert") / "bert", "bert", "MASKED_LM")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2."""
    return make_base(tmp_path_factory.mktemp("gpt2") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral."""
    return make_base(tmp_path_factory.mktemp("mixtral") / "mixtral", "mixtral")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_base(tmp_path_factory.mktemp("llama") / "llama", "llama")


def classifier(targets: list[str], **changes: Any) -> LoraConfig:
    """Build the configuration of an adapter with a head."""
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": targets, **changes})


def renamed(base: Path, target: Path, pattern: str, replacement: str) -> Path:
    """Copy a model with other names of its tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {re.sub(pattern, replacement, k): v for k, v in load_file(base / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_masked_tokens(bert: Path, tmp_path: Path) -> None:
    """BERT with its head over tokens."""
    config = LoraConfig(r=4, target_modules=["query", "value", "dense"])
    assert_equal_to_peft(run_case(bert, tmp_path, config, "MASKED_LM"))


@pytest.mark.parametrize("config", [classifier(["query"]), classifier(["query", "value"], modules_to_save=["pooler"])])
def test_a_classifier_on_bert(bert: Path, tmp_path: Path, config: LoraConfig) -> None:
    """The head that the adapter brings is written, that over tokens is left out, and the configuration names the
    labels."""
    settings = {"num_labels": 3}
    outputs = ["bad", "fair", "good"]
    # A base without a pooler has one drawn at random, which then must be trained.
    config.modules_to_save = ["pooler", "classifier"]
    case = run_case(bert, tmp_path, config, "SEQ_CLS", settings=settings, outputs=outputs)
    merged = assert_equal_to_peft(case)
    assert merged.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert case.config()["architectures"] == ["BertForSequenceClassification"]
    assert case.findings.dropped_tensors
    assert all(name.startswith("cls.") for name in case.findings.dropped_tensors)
    assert {c.name for c in case.findings.changes if c.kind == "Added"} >= {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("outputs", [None, ["low", "high"]])
def test_a_classifier_on_a_language_model(llama: Path, tmp_path: Path, outputs: list[str] | None) -> None:
    """A decoder's output head is left out; labels without names get transformers' usual ones."""
    case = run_case(llama, tmp_path, classifier(["q_proj"]), "SEQ_CLS", settings={"num_labels": 2}, outputs=outputs)
    merged = assert_equal_to_peft(case)
    assert merged.config.id2label == dict(enumerate(outputs or ["LABEL_0", "LABEL_1"]))
    assert case.findings.dropped_tensors == ("lm_head.weight",)
    assert case.config()["architectures"] == ["LlamaForSequenceClassification"]


def test_a_reward_model(llama: Path, tmp_path: Path) -> None:
    """One output: a reward."""
    case = run_case(llama, tmp_path, classifier(["q_proj"]), "SEQ_CLS", settings={"num_labels": 1}, outputs=["reward"])
    assert_equal_to_peft(case)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"^transformer\.", ""), (r"LayerNorm\.weight", "LayerNorm.gamma")],
    ids=["without-prefix", "as-saved"],
)
def test_gpt2_files_without_a_prefix(gpt2: Path, tmp_path: Path, pattern: str, replacement: str) -> None:
    """A GPT-2 saved without its head has h.0 where the loaded model has transformer.h.0."""
    base = renamed(gpt2, tmp_path / "base", pattern, replacement)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    case = run_case(base, tmp_path, config)
    assert_equal_to_peft(case)
    assert load_file(case.merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_old_names_of_norms(bert: Path, tmp_path: Path) -> None:
    """BERT files of old have LayerNorm.gamma and beta."""
    base = renamed(bert, tmp_path / "new", r"LayerNorm\.weight$", "LayerNorm.gamma")
    base = renamed(base, tmp_path / "base", r"LayerNorm\.bias$", "LayerNorm.beta")
    config = LoraConfig(r=4, target_modules=["query"], bias="all", modules_to_save=["LayerNorm"])
    case = run_case(base, tmp_path, config, "MASKED_LM")
    assert_equal_to_peft(case)
    assert "bert.embeddings.LayerNorm.gamma" in load_file(case.merged / "model.safetensors")


def test_an_adapter_of_a_model_without_its_head(llama: Path, tmp_path: Path) -> None:
    """An adapter that was trained on the model without its head has layers.0 where files have model.layers.0."""
    adapted = adapt(load(llama), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    save_file({k.replace("model.model.", "model."): v for k, v in load_file(weights).items()}, weights)
    merge_folders(llama, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_single_experts(mixtral: Path, tmp_path: Path) -> None:
    """Adapters of older transformers name the layers of every expert, as the files do; peft converts them to load
    them."""
    adapted = adapt(load(mixtral), LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer in range(2):
        for expert in range(4):
            for name, (inputs, outputs) in {"w1": (32, 48), "w3": (32, 48), "w2": (48, 32)}.items():
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                weights[f"{module}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) * 0.1
                weights[f"{module}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator) * 0.1
    save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "w1", "w2", "w3"]
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with quiet():
        expected = logits(PeftModel.from_pretrained(load(mixtral), tmp_path / "adapter"))
    findings = merge_folders(mixtral, tmp_path / "adapter", tmp_path / "merged")
    assert len(findings.changes) == 2 + 2 * 4 * 3
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)


class Mixed(nn.Module):
    """Convolutions, which no text model of the tests has."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(3, 8, 3)
        self.line = nn.Conv1d(8, 6, 5)
        self.point = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all layers."""
        x = self.flat(x)
        result: torch.Tensor = self.point(x).mean() + self.line(x.flatten(2)).mean()
        return result


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions(tmp_path: Path, use_dora: bool) -> None:
    """Convolutions of one group are matrices of their outputs."""
    torch.manual_seed(0)
    model = Mixed()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "mixed"}')
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", {"format": "pt"})
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["flat", "line", "point"], use_dora=use_dora)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape) * 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    findings = merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert [change.name for change in findings.changes] == ["flat.weight", "line.weight", "point.weight"]
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, expected in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
