"""An Axolotl configuration as a FineTuneJob: a pure function, and the table of the keys that it converts.

A key either becomes a field, or is reported with the reason. One without which the result would be another is an error.
Where Axolotl's default is not ours, Axolotl's is written into the FineTuneJob.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunewright_api import API_VERSION
from tunewright_api.v1alpha1.finetunejob import KIND, MAX_NAME_LENGTH
from tunewright_api.validation import InvalidDocument, Problem, parse_finetunejob
from tunewright_cli.axolotl.data import convert_data
from tunewright_cli.axolotl.draft import Draft, Kind, Note
from tunewright_cli.axolotl.evaluation import convert_evaluation
from tunewright_cli.axolotl.keys import CONFIG, report_left
from tunewright_cli.axolotl.recipe import convert_dtype, convert_method, convert_objective
from tunewright_cli.axolotl.results import convert_results
from tunewright_cli.axolotl.sources import HUB_NAME, PLACEHOLDER, bucket_key
from tunewright_cli.axolotl.templates import convert_template
from tunewright_cli.axolotl.training import (
    EXTRA_NUMBERS,
    FLAGS,
    NUMBERS,
    TEXTS,
    WHOLE_NUMBERS,
    convert_training,
)

FIELDS: dict[str, str] = {
    **TEXTS,
    **WHOLE_NUMBERS,
    **NUMBERS,
    **FLAGS,
    **dict.fromkeys(EXTRA_NUMBERS, "hyperparameters.extra"),
    "base_model": "model.uri",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bfloat16": "model.dtype",
    "float16": "model.dtype",
    "float32": "model.dtype",
    "sdp_attention": "model.attention",
    "eager_attention": "model.attention",
    "attn_implementation": "model.attention",
    "chat_template": "model.chatTemplate",
    "chat_template_jinja": "model.chatTemplate",
    "datasets": "dataset.train, dataset.format, dataset.columns",
    "test_datasets": "dataset.validation",
    "val_set_size": "dataset.validationFraction",
    "rl": "objective.type",
    "reward_model": "objective.type",
    "num_labels": "objective.type",
    "train_on_inputs": "objective.sft.loss",
    "rl_beta": "objective.dpo.beta, objective.kto.beta, objective.grpo.beta",
    "dpo_beta": "objective.dpo.beta",
    "trl": "objective.dpo.beta, objective.kto.beta, objective.grpo",
    "dpo_loss_type": "objective.dpo.loss",
    "dpo_label_smoothing": "objective.dpo.labelSmoothing",
    "max_prompt_len": "objective.dpo.maxPromptLength, objective.kto.maxPromptLength, objective.grpo.maxPromptLength",
    "kto_desirable_weight": "objective.kto.desirableWeight",
    "kto_undesirable_weight": "objective.kto.undesirableWeight",
    "center_rewards_coefficient": "objective.reward.centerRewards",
    "adapter": "method.type",
    "load_in_4bit": "method.type, method.quantization.bits",
    "load_in_8bit": "method.type, method.quantization.bits",
    "bnb_config_kwargs": "method.quantization",
    "lora_r": "method.lora.rank",
    "lora_alpha": "method.lora.alpha",
    "lora_dropout": "method.lora.dropout",
    "lora_target_linear": "method.lora.targets",
    "lora_target_modules": "method.lora.targetModules",
    "lora_modules_to_save": "method.lora.modulesToSave",
    "peft_use_rslora": "method.lora.useRslora",
    "peft_use_dora": "method.lora.useDora",
    "num_epochs": "hyperparameters.epochs",
    "max_steps": "hyperparameters.maxSteps",
    "lr_scheduler": "hyperparameters.scheduler",
    "lr_scheduler_kwargs": "hyperparameters.extra",
    "warmup_ratio": "hyperparameters.warmupRatio",
    "warmup_steps": "hyperparameters.warmupRatio",
    "micro_batch_size": "hyperparameters.batchSize",
    "gradient_accumulation_steps": "hyperparameters.gradientAccumulationSteps",
    "batch_size": "hyperparameters.gradientAccumulationSteps",
    "optimizer": "hyperparameters.optimizer",
    "optim_args": "hyperparameters.extra",
    "neftune_noise_alpha": "hyperparameters.neftuneNoiseAlpha",
    "noisy_embedding_alpha": "hyperparameters.neftuneNoiseAlpha",
    "group_by_length": "hyperparameters.extra",
    "max_grad_norm": "hyperparameters.maxGradNorm",
    "gradient_checkpointing": "hyperparameters.gradientCheckpointing",
    "eval_strategy": "evaluation.strategy",
    "evaluation_strategy": "evaluation.strategy",
    "eval_steps": "evaluation.steps",
    "evals_per_epoch": "evaluation.strategy",
    "load_best_model_at_end": "evaluation.loadBest",
    "early_stopping_patience": "evaluation.earlyStopping",
    "metric_for_best_model": "evaluation.metric",
    "greater_is_better": "evaluation.metric",
    "hub_model_id": "output.hub.repository",
    "hub_revision": "output.hub.revision",
    "hub_strategy": "output.hub",
    "use_mlflow": "tracking.mlflow",
    "mlflow_tracking_uri": "tracking.mlflow.uri",
    "mlflow_experiment_name": "tracking.mlflow.experiment",
    "use_tensorboard": "tracking.tensorboard",
    "use_wandb": "tracking.wandb",
    "wandb_project": "tracking.wandb.project",
    "wandb_entity": "tracking.wandb.entity",
    "wandb_mode": "tracking.wandb",
}
"""Axolotl's key -> field of the spec, for all keys that are converted."""

_ATTENTION = {"eager": "Eager", "sdpa": "SDPA"}
_SPEED_PLUGINS = ("liger", "cut_cross_entropy")


@dataclass(frozen=True)
class Conversion:
    """A FineTuneJob in the project's order of fields, and what there is to say. With errors there is no document."""

    document: dict[str, Any] | None
    notes: tuple[Note, ...]

    @property
    def errors(self) -> tuple[Note, ...]:
        """Notes that keep the configuration from being converted."""
        return tuple(note for note in self.notes if note.kind is Kind.ERROR)


def convert(config: Mapping[str, Any], name: str) -> Conversion:
    """Convert a configuration.

    Args:
        config: The configuration, read as kubectl reads YAML.
        name: Name of the FineTuneJob.
    """
    draft = Draft(config)
    _model(draft)
    objective = convert_objective(draft)
    rows = convert_data(draft, objective)
    convert_template(draft, rows)
    convert_method(draft)
    convert_dtype(draft)
    convert_training(draft, objective)
    convert_evaluation(draft, objective)
    convert_results(draft)
    _plugins_and_tokens(draft)
    report_left(draft, CONFIG, frozenset(FIELDS))
    draft.set("output.uri", f"{PLACEHOLDER}/{name}")
    text = f"put your own bucket in place of {PLACEHOLDER} in output.uri, and its Secret into storage.secretName where "
    draft.note(Kind.TO_DO, "", text + "the platform has none")
    document = None
    if not any(note.kind is Kind.ERROR for note in draft.notes):
        document = _checked(draft, name)
    order = list(Kind)
    return Conversion(document, tuple(sorted(draft.notes, key=lambda note: order.index(note.kind))))


def job_name(text: str) -> str:
    """Return a name for a FineTuneJob made of any text, such as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:MAX_NAME_LENGTH].strip("-") or "axolotl"


def _checked(draft: Draft, name: str) -> dict[str, Any] | None:
    """Return the document with its fields in order; None after noting what the API would refuse."""
    header = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}}
    try:
        job = parse_finetunejob({**header, "spec": draft.spec})
    except InvalidDocument as error:
        for problem in error.problems:
            draft.notes.append(_of_problem(draft, problem))
        return None
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {**header, "spec": spec}


def _of_problem(draft: Draft, problem: Problem) -> Note:
    path = problem.path
    while path and path not in draft.origins:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return Note(Kind.ERROR, draft.origins.get(path, ""), f"becomes {problem}")


def _model(draft: Draft) -> None:
    name = draft.take_text("base_model")
    if name is None:
        draft.note(Kind.ERROR, "base_model", "missing: say which model is trained")
    elif name.startswith("s3://"):
        draft.set("model.uri", name, "base_model")
    elif re.fullmatch(HUB_NAME, name):
        draft.set("model.uri", f"hf://{name}", "base_model")
    elif "/" in name:
        uri = f"{PLACEHOLDER}/{bucket_key(name)}"
        draft.set("model.uri", uri, "base_model")
        text = f"copy the folder {name} to your own bucket, and write its URI in place of {uri}"
        draft.note(Kind.TO_DO, "base_model", text)
    else:
        text = f"write the organisation before the name, such as openai-community/gpt2, not {name!r} alone"
        draft.note(Kind.ERROR, "base_model", text)
    for key in ("base_model_config", "tokenizer_config"):
        if name is not None and draft.left().get(key) == name:
            draft.take(key)
            draft.note(Kind.NOT_NEEDED, key, "the same as base_model")
    asked = [kind for key, kind in (("sdp_attention", "SDPA"), ("eager_attention", "Eager")) if draft.take_flag(key)]
    implementation = draft.take_text("attn_implementation")
    if implementation in _ATTENTION:
        asked.append(_ATTENTION[implementation])
    elif implementation is not None:
        text = "kernels change the speed, not the result; the fastest that is installed is taken"
        draft.note(Kind.NOT_NEEDED, "attn_implementation", text)
    draft.set("model.attention", asked[0] if asked else None, "attn_implementation")


def _plugins_and_tokens(draft: Draft) -> None:
    for plugin in draft.take_texts("plugins"):
        if any(part in plugin for part in _SPEED_PLUGINS):
            text = "kernels change the speed, not the result; the fastest that is installed is taken"
            draft.note(Kind.NOT_NEEDED, "plugins", f"{plugin}: {text}")
        else:
            draft.note(Kind.ERROR, "plugins", f"{plugin}: plugins are not run; remove it to convert without it")
    tokens = draft.take_mapping("special_tokens")
    for name in tokens:
        if name == "pad_token":
            draft.note(Kind.NOT_NEEDED, "special_tokens.pad_token", "padding is not learned")
        elif tokens[name] is not None:
            text = "the tokenizer's own is used; where it is another, change it in a copy of the model"
            draft.note(Kind.DIFFERS, f"special_tokens.{name}", text)
    strategy = draft.take("excess_length_strategy")
    if strategy is not None:
        kind = Kind.NOT_NEEDED if strategy == "truncate" else Kind.DIFFERS
        text = "rows longer than sequence_len are cut at the end, and counted in the report"
        draft.note(kind, "excess_length_strategy", text)
