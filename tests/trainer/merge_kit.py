"""Tiny random models and adapters for the tests of merging, and the comparison with peft's own merge."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tunewright_trainer.merge.adapter import load_adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.readers import FolderReader
from tunewright_trainer.merge.sinks import FolderSink
from tunewright_trainer.merge.stream import MergeFindings, merge

SMALL: dict[str, Any] = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {**LLAMA, "head_dim": 8, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bert": (
        "bert",
        {
            **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
            "tie_word_embeddings": True,
            "type_vocab_size": 2,
        },
    ),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    "qwen3_moe": (
        "qwen3_moe",
        {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False, "mlp_only_layers": []},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **LLAMA,
            "head_dim": 8,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
}
KINDS: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "MASKED_LM": AutoModelForMaskedLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
}
IDS = torch.tensor([[3, 7, 11, 40, 5, 47, 2], [1, 2, 3, 4, 5, 6, 7]])


@contextmanager
def quiet() -> Iterator[None]:
    """Let peft say what it thinks of tied weights; the tests know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_base(folder: Path, name: str, kind: str = "CAUSAL_LM", **save: Any) -> Path:
    """Write a random model of one of MODELS; `save` goes to save_pretrained."""
    family, settings = MODELS[name]
    torch.manual_seed(0)
    model = KINDS[kind].from_config(AutoConfig.for_model(family, **settings))
    for parameter in model.parameters():
        # Biases begin as 0 and norms as 1, which would hide what is done to them.
        parameter.data += torch.randn(parameter.shape) * 0.02
    model.save_pretrained(folder, **save)
    return folder


def load(folder: Path, kind: str = "CAUSAL_LM", **settings: Any) -> PreTrainedModel:
    """Load a model in evaluation mode, float32; nothing may be missing from the files, unless settings say so."""
    given = {"dtype": torch.float32, **settings}
    model, info = KINDS[kind].from_pretrained(folder, output_loading_info=True, **given)
    if not settings:
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of a few ids."""
    ids = IDS % model.config.vocab_size  # type: ignore[union-attr, operator]
    result: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


def adapt(model: PreTrainedModel, config: PeftConfig, seed: int = 1) -> PeftModel:
    """Put an adapter on a model and give it weights as if it were trained."""
    torch.manual_seed(seed)
    with quiet():
        # A copy: saving marks the configuration as one for inference, which would train nothing the next time.
        adapted = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            step = torch.randn(parameter.shape, generator=generator) * 0.1
            scale = parameter.data.abs().mean() if "ia3" in name or "magnitude" in name else 1.0
            parameter.data += step * scale
    adapted.eval()
    return adapted


@dataclass
class Case:
    """An adapter on a base, and what was made of it."""

    base: Path
    adapter: Path
    merged: Path
    kind: str
    adapted_logits: torch.Tensor
    reference: dict[str, torch.Tensor] = field(repr=False)
    """State of the model that peft merges."""
    findings: MergeFindings = field(repr=False)

    def config(self) -> dict[str, Any]:
        """Return the merged model's configuration."""
        document: dict[str, Any] = json.loads((self.merged / "config.json").read_text())
        return document


def merge_folders(base: Path, adapter: Path, target: Path, **options: Any) -> MergeFindings:
    """Merge from folder to folder."""
    return merge(Checkpoint(FolderReader(base)), load_adapter(adapter), FolderSink(target), **options)


def run_case(
    base: Path,
    work: Path,
    config: PeftConfig,
    kind: str = "CAUSAL_LM",
    *,
    before: Callable[[PreTrainedModel], None] | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """Train (so to speak), save, merge by peft and by us.

    Args:
        base: The base model.
        work: Gets adapter/ and merged/.
        config: Of the adapter.
        kind: Of the model; one of KINDS.
        before: Done to the base before the adapter is put on it.
        settings: For loading the base, such as the number of labels.
        options: For our merge.
    """
    model = load(base, kind, **(settings or {}))
    if before is not None:
        before(model)
    adapted = adapt(model, config)
    with quiet():
        adapted.save_pretrained(work / "adapter")
        adapted_logits = logits(adapted)
        reference = {k: v.clone() for k, v in adapted.merge_and_unload().state_dict().items()}
    findings = merge_folders(base, work / "adapter", work / "merged", **options)
    return Case(base, work / "adapter", work / "merged", kind, adapted_logits, reference, findings)


def assert_equal_to_peft(case: Case, *, same_weights: bool = True) -> PreTrainedModel:
    """Compare tensor by tensor and logit by logit.

    Args:
        case: What.
        same_weights: Compare the weights; False where peft merges tied weights into a model that computes other
            logits than base and adapter do.
    """
    merged = load(case.merged, case.kind)
    state = merged.state_dict()
    if same_weights:
        assert state.keys() == case.reference.keys()
        for name, expected in case.reference.items():
            difference = (state[name] - expected).norm() / expected.norm().clamp(min=1e-12)
            assert difference <= 1e-5, f"{name}: {difference}"
    torch.testing.assert_close(logits(merged), case.adapted_logits, rtol=1e-4, atol=1e-5)
    return merged
