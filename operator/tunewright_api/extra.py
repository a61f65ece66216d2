"""`hyperparameters.extra`: further TrainingArguments by their own names, checked without transformers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt, WithJsonSchema

from tunewright_api.training_arguments import CHOICES, TYPES

MAX_EXTRA = 32
MAX_TEXT = 1024

OWN: dict[str, str] = {
    "output_dir": "output.uri",
    "num_train_epochs": "hyperparameters.epochs",
    "max_steps": "hyperparameters.maxSteps",
    "learning_rate": "hyperparameters.learningRate",
    "lr_scheduler_type": "hyperparameters.scheduler",
    "warmup_steps": "hyperparameters.warmupRatio",
    "per_device_train_batch_size": "hyperparameters.batchSize",
    "auto_find_batch_size": "hyperparameters.batchSize",
    "gradient_accumulation_steps": "hyperparameters.gradientAccumulationSteps",
    "optim": "hyperparameters.optimizer",
    "weight_decay": "hyperparameters.weightDecay",
    "max_grad_norm": "hyperparameters.maxGradNorm",
    "activation_checkpointing": "hyperparameters.gradientCheckpointing",
    "gradient_checkpointing": "hyperparameters.gradientCheckpointing",
    "gradient_checkpointing_kwargs": "hyperparameters.extra.activation_checkpointing_kwargs",
    "neftune_noise_alpha": "hyperparameters.neftuneNoiseAlpha",
    "seed": "hyperparameters.seed",
    "data_seed": "hyperparameters.seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype",
    "use_cpu": "resources.gpus",
    "eval_strategy": "evaluation.strategy",
    "eval_steps": "evaluation.steps",
    "load_best_model_at_end": "evaluation.loadBest",
    "metric_for_best_model": "evaluation.metric",
    "greater_is_better": "evaluation.metric",
    "report_to": "tracking",
    "project": "tracking",
    "run_name": "metadata.name",
}
"""Arguments that a field of the spec decides on, and the field."""

_HANDLED = frozenset(
    {
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "disable_tqdm"),
        *("eval_on_start", "prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches"),
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        *("enable_jit_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
        *("resume_from_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "remove_unused_columns", "length_column_name", "accelerator_config"),
        *("local_rank", "ddp_backend", "fsdp", "fsdp_config", "deepspeed", "log_on_each_node", "optim_target_modules"),
        *("do_train", "do_eval", "do_predict", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("use_liger_kernel", "debug", "include_num_input_tokens_seen", "eval_use_gather_object", "use_cache"),
    }
)
"""Arguments that are tunewright's own: every step is logged, rows arrive tokenised, results are published by itself."""

_COMPILATION = frozenset({"torch_compile", "torch_compile_backend", "torch_compile_mode"})
"""Arguments that turn torch.compile on (each of them does). It needs a C compiler where it trains, which the trainer's
image is without; and batches of many lengths are compiled again and again."""

_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "json": "JSON text"}


def allowed() -> dict[str, tuple[str, ...]]:
    """Return the names that `extra` takes, each with the kinds of its value."""
    return {name: kinds for name, kinds in TYPES.items() if name not in {*OWN, *_HANDLED, *_COMPILATION}}


def problem_of(name: str, value: Any) -> str | None:
    """Return what is wrong with one entry, None where nothing is."""
    if name in OWN:
        return f"{name} is set by {OWN[name]}: use that field"
    if name in _HANDLED:
        return f"{name} is set by tunewright itself: leave it out"
    if name in _COMPILATION and value is not False:
        return (
            f"{name} wants torch.compile, which needs a C compiler that the trainer's image does not have: leave it out"
        )
    if name not in TYPES:
        nearest = difflib.get_close_matches(name, [*allowed(), *OWN], n=1, cutoff=0.6)
        return f"{name} is not a scalar TrainingArguments field" + (f": did you mean {nearest[0]}?" if nearest else "")
    kinds = TYPES[name]
    if not any(_fits(kind, value) for kind in kinds):
        return f"{name} is {value!r}, but takes {' or '.join(_WORDS[kind] for kind in kinds)}"
    choices = CHOICES.get(name)
    if choices and value not in choices:
        return f"{name} is {value!r}, but takes one of {', '.join(choices)}"
    return None


def _fits(kind: str, value: Any) -> bool:
    match kind:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "json":
            return isinstance(value, str) and _is_object(value)
    return isinstance(value, str)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _check(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    problems = [problem for name, value in extra.items() if (problem := problem_of(name, value))]
    if problems:
        raise ValueError("; ".join(problems))
    return extra


ExtraValue = Annotated[
    StrictBool | StrictInt | StrictFloat | Annotated[str, Field(max_length=MAX_TEXT)],
    # A structural schema has no word for "number, text or boolean"; names and types are checked by the operator.
    WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True}),
]
Extra = Annotated[
    dict[Annotated[str, Field(max_length=64)], ExtraValue], Field(max_length=MAX_EXTRA), AfterValidator(_check)
]
