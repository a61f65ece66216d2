"""The adapter's configuration for a model."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunewright_api.defaults import ResolvedLoRA
from tunewright_trainer.targets import check_targets, resolve_preset


def lora_config(model: PreTrainedModel, lora: ResolvedLoRA, revision: str | None) -> LoraConfig:
    """Return the adapter's configuration for this model; it will name `model.name_or_path` as its base.

    Raises:
        InvalidConfiguration: A target does not exist in the model.
    """
    layers = linear_layers(model)
    if lora.target_modules is not None:
        targets = check_targets(lora.target_modules, layers)
    else:
        targets = resolve_preset(lora.targets or "AllLinear", layers)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        # GPT-2's Conv1D keeps its weight transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        revision=revision,
    )


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the full names of all linear layers but the output head, quantized ones included."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
