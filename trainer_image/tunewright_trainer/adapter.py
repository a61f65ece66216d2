"""The adapter's configuration for a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from peft.utils.constants import (
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunewright_api.defaults import ResolvedLoRA
from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.method import IA3, PromptTuning
from tunewright_trainer.errors import InvalidAdapter, InvalidConfiguration
from tunewright_trainer.targets import check_modules, check_targets, resolve_preset

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
_BIAS = {"None": "none", "All": "all", "LoRAOnly": "lora_only"}


def adapter_config(
    model: PreTrainedModel | PeftModel, run: TrainRun, tokenizer_path: str, task_type: TaskType = "CAUSAL_LM"
) -> PeftConfig | None:
    """Return the configuration of a new adapter for this model, None for full fine-tuning and for a model that has
    its adapter already.

    The adapter will name `model.name_or_path` as its base.

    Args:
        model: The base model.
        run: The run document.
        tokenizer_path: Folder of the tokenizer, for the text that prompt tuning starts from.
        task_type: Whether the model predicts tokens or classes.

    Raises:
        InvalidConfiguration: A target does not exist in the model, or the rank is larger than the layers.
    """
    if run.lora is not None:
        return lora_config(model, run.lora, run.model.revision, task_type)
    if run.ia3 is not None:
        return ia3_config(model, run.ia3, run.model.revision)
    if run.prefix_tuning is not None:
        return PrefixTuningConfig(
            task_type=task_type,
            num_virtual_tokens=run.prefix_tuning.virtual_tokens,
            prefix_projection=run.prefix_tuning.projection,
            revision=run.model.revision,
        )
    if run.prompt_tuning is not None:
        return prompt_tuning_config(run.prompt_tuning, tokenizer_path, run.model.revision)
    return None


def with_loaded_adapter(
    model: PreTrainedModel, folder: Path, revision: str | None, *, is_empty: bool = False
) -> PeftModel:
    """Return the model with a saved adapter that is trained further; it will name `model.name_or_path` as its base.

    Args:
        model: The base model.
        folder: Files of the adapter.
        revision: The base's, for the adapter's configuration.
        is_empty: The base has no weights; the adapter is only compared with it.

    Raises:
        InvalidAdapter: The adapter is not one of this model.
    """
    options = {"is_trainable": True, "low_cpu_mem_usage": is_empty}
    adapted = load_adapter(model, folder, "the adapter of model.continueFrom", model.name_or_path, **options)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = model.name_or_path, revision
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path, name: str, base: str | None, **options: bool) -> PeftModel:
    """Return the model with a saved adapter.

    Args:
        model: The base model.
        folder: Files of the adapter.
        name: What messages call the adapter.
        base: What they call the model.
        options: Of `PeftModel.from_pretrained`.

    Raises:
        InvalidAdapter: The adapter is not one of this model.
    """
    try:
        with warnings.catch_warnings():
            # peft draws weights that the file lacks at random: then the file is another model's.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder, **options)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        reason = " ".join(str(error).split())[:400]
        raise InvalidAdapter(f"{name} does not fit {base}: {reason}") from error


def lora_config(
    model: PreTrainedModel, lora: ResolvedLoRA, revision: str | None, task_type: TaskType = "CAUSAL_LM"
) -> LoraConfig:
    """Return the configuration of LoRA and QLoRA.

    Raises:
        InvalidConfiguration: A target does not exist in the model, or the rank is larger than the layers.
    """
    layers = linear_layers(model)
    if lora.target_modules is not None:
        targets = check_targets(lora.target_modules, list(layers))
    else:
        targets = resolve_preset(lora.targets or "AllLinear", list(layers))
    check_rank(lora.rank, targets, layers)
    saved = lora.modules_to_save
    return LoraConfig(
        task_type=task_type,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=check_modules(saved, [name for name, _ in model.named_modules()]) if saved else None,
        bias=_BIAS[lora.bias],
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        # GPT-2's Conv1D keeps its weight transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        # Embedding and output head are one tensor in many models: trained as one, they stay one.
        ensure_weight_tying=bool(saved) and bool(getattr(model.config, "tie_word_embeddings", False)),
        revision=revision,
    )


def ia3_config(model: PreTrainedModel, ia3: IA3, revision: str | None) -> IA3Config:
    """Return the configuration of IA3.

    Raises:
        InvalidConfiguration: A target does not exist in the model, or the model family is not known.
    """
    layers = list(linear_layers(model))
    if ia3.target_modules is not None:
        targets = check_targets(ia3.target_modules, layers, "ia3.targetModules")
        feedforward = ia3.feedforward_modules or []
    else:
        family = model.config.model_type
        if family not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
            raise InvalidConfiguration(
                f"IA3 has no default layers for models of type {family!r}: name them in ia3.targetModules and "
                f"ia3.feedforwardModules, out of {', '.join(sorted({n.rpartition('.')[2] for n in layers}))}"
            )
        targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[family]
        feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family]
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        revision=revision,
    )


def prompt_tuning_config(prompt: PromptTuning, tokenizer_path: str, revision: str | None) -> PromptTuningConfig:
    """Return the configuration of prompt tuning."""
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=prompt.virtual_tokens,
        prompt_tuning_init="TEXT" if prompt.init_text else "RANDOM",
        prompt_tuning_init_text=prompt.init_text,
        tokenizer_name_or_path=tokenizer_path if prompt.init_text else None,
        revision=revision,
    )


def linear_layers(model: PreTrainedModel) -> dict[str, int]:
    """Return the full names of all linear layers but the output head, quantized ones included, with their smaller
    dimension."""
    head = model.get_output_embeddings()
    return {
        name: smaller_dimension(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and name.split(".")[0] not in SEQ_CLS_HEAD_NAMES
    }


def smaller_dimension(layer: nn.Linear | Conv1D) -> int:
    """Return the highest rank that a layer's weight can have; a quantized weight's own shape does not tell."""
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)
    return min(layer.weight.shape)


def check_rank(rank: int, targets: list[str], layers: dict[str, int]) -> None:
    """Refuse a rank that no update of a layer can have.

    Raises:
        InvalidConfiguration: Naming the narrowest layer.
    """
    chosen = {name: size for name, size in layers.items() if any(name == t or name.endswith(f".{t}") for t in targets)}
    narrowest = min(chosen, key=lambda name: chosen[name])
    if rank > chosen[narrowest]:
        raise InvalidConfiguration(
            f"lora.rank is {rank}, but {narrowest} has only {chosen[narrowest]} rows or columns, the highest rank an "
            f"update of it can have: lower lora.rank to at most {chosen[narrowest]}, or leave the layer out of "
            "lora.targetModules"
        )
