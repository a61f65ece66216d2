"""Training arguments."""

from __future__ import annotations

import json
import math
from typing import Any

from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_cli.axolotl.draft import Draft, Kind

NUMBERS: dict[str, str] = {
    "learning_rate": "hyperparameters.learningRate",
    "weight_decay": "hyperparameters.weightDecay",
}
WHOLE_NUMBERS: dict[str, str] = {
    "sequence_len": "hyperparameters.maxSequenceLength",
    "seed": "hyperparameters.seed",
}
FLAGS: dict[str, str] = {"sample_packing": "hyperparameters.packing"}
TEXTS: dict[str, str] = {"revision_of_model": "model.revision"}
DEFAULTS: dict[str, Any] = {"sequence_len": 512}
"""Keys that become a field as they stand, and Axolotl's defaults where they are not ours."""
EXTRA_NUMBERS = ("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor")
"""Numbers that transformers has under the same name."""

_SCHEDULERS = {
    "cosine": "Cosine",
    "cosine_with_restarts": "CosineWithRestarts",
    "linear": "Linear",
    "polynomial": "Polynomial",
    "inverse_sqrt": "InverseSqrt",
    "constant": "Constant",
    "constant_with_warmup": "ConstantWithWarmup",
}
_OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_apex_fused": "AdamW",
    "adamw_hf": "AdamW",
    "adamw_bnb_8bit": "AdamW8bit",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "adafactor": "Adafactor",
    "lion_32bit": "Lion",
    "lion_pytorch": "Lion",
    "sgd": "SGD",
}
_WARMUP_RATIO = 0.03
"""What Axolotl warms up for where nothing is said, up to 100 steps."""


def convert_training(draft: Draft, objective: ObjectiveType) -> None:
    """Set hyperparameters."""
    _as_they_stand(draft)
    _schedule(draft)
    _batches(draft)
    _optimizer(draft)
    _noise(draft, objective)
    _sampling(draft, objective)


def _as_they_stand(draft: Draft) -> None:
    for key, field in TEXTS.items():
        draft.set(field, draft.take_text(key), key)
    for key, field in NUMBERS.items():
        draft.set(field, draft.take_number(key), key)
    for key, field in FLAGS.items():
        draft.set(field, draft.take_flag(key), key)
    for key, field in WHOLE_NUMBERS.items():
        value = draft.take_whole(key)
        draft.set(field, DEFAULTS.get(key) if value is None else value, "" if value is None else key)


def _schedule(draft: Draft) -> None:
    epochs, steps = draft.take_number("num_epochs"), draft.take_whole("max_steps")
    steps = steps if steps is not None and steps > 0 else None  # -1 is how transformers says: none
    if steps is None:
        draft.set("hyperparameters.epochs", epochs, "num_epochs")
    else:
        draft.set("hyperparameters.maxSteps", steps, "max_steps")
        if epochs is not None:
            draft.note(Kind.NOT_NEEDED, "num_epochs", "max_steps wins, in Axolotl as well")
    scheduler = draft.take_text("lr_scheduler")
    if scheduler is not None and scheduler not in _SCHEDULERS:
        text = f"{scheduler!r} is not known here: use one of {', '.join(_SCHEDULERS)}"
        draft.note(Kind.ERROR, "lr_scheduler", text)
        scheduler = None
    arguments = draft.take_mapping("lr_scheduler_kwargs")
    if arguments:
        draft.set("hyperparameters.extra.lr_scheduler_kwargs", json.dumps(arguments), "lr_scheduler_kwargs")
    elif scheduler == "cosine_with_restarts":
        scheduler = "cosine"  # which is what transformers makes of its default of one cycle
    draft.set("hyperparameters.scheduler", _SCHEDULERS.get(scheduler or ""), "lr_scheduler")
    _warmup(draft, steps, has_warmup=scheduler != "constant")


def _warmup(draft: Draft, steps: int | None, *, has_warmup: bool) -> None:
    ratio, warmup = draft.take_number("warmup_ratio"), draft.take_number("warmup_steps")
    if not has_warmup:
        for key, value in (("warmup_ratio", ratio), ("warmup_steps", warmup)):
            if value is not None:
                draft.note(Kind.NOT_NEEDED, key, "a constant learning rate has no warm-up")
    elif warmup is None:
        value, key = (_WARMUP_RATIO, "") if ratio is None else (ratio, "warmup_ratio")
        draft.set("hyperparameters.warmupRatio", value, key)
    elif warmup < 1:
        draft.set("hyperparameters.warmupRatio", warmup, "warmup_steps")
    elif steps is not None and warmup < steps:
        draft.set("hyperparameters.warmupRatio", _share(int(warmup), steps), "warmup_steps")
    else:
        text = "only a share of the run can be said, and 6 % is the default: set hyperparameters.warmupRatio to "
        draft.note(Kind.NOT_CONVERTED, "warmup_steps", text + f"{warmup} / steps (tunewright plan counts them)")


def _share(part: int, steps: int) -> float:
    """Return a share with few digits that comes to exactly `part` of `steps` when it is rounded up."""
    millionths = math.floor(part / steps * 1e6)
    while math.ceil(millionths / 1e6 * steps) > part:
        millionths -= 1
    return millionths / 1e6


def _batches(draft: Draft) -> None:
    micro, accumulation = draft.take_whole("micro_batch_size"), draft.take_whole("gradient_accumulation_steps")
    total = draft.take_whole("batch_size")
    if total is not None and micro is not None and accumulation is None:
        accumulation = max(1, total // max(1, micro))
    elif total is not None and accumulation is not None and micro is None:
        micro = max(1, total // max(1, accumulation))
    elif total is not None:
        draft.note(Kind.NOT_NEEDED, "batch_size", "micro_batch_size and gradient_accumulation_steps say it")
    draft.set("hyperparameters.batchSize", micro or 1, "micro_batch_size")
    draft.set("hyperparameters.gradientAccumulationSteps", accumulation or 1, "gradient_accumulation_steps")


def _optimizer(draft: Draft) -> None:
    name = draft.take_text("optimizer") or "adamw_torch_fused"
    if name not in _OPTIMIZERS:
        draft.note(Kind.ERROR, "optimizer", f"{name!r} is not known here: use one of {', '.join(_OPTIMIZERS)}")
    draft.set("hyperparameters.optimizer", _OPTIMIZERS.get(name), "optimizer")
    norm = draft.take_number("max_grad_norm")
    if norm == 0:
        text = "gradients are always clipped: set it to a large number, such as 1000, to convert without clipping"
        draft.note(Kind.ERROR, "max_grad_norm", text)
    # 1.0 is the default of transformers, and of Axolotl with it; ours for QLoRA is lower.
    draft.set("hyperparameters.maxGradNorm", 1.0 if norm is None else norm, "" if norm is None else "max_grad_norm")
    for key in EXTRA_NUMBERS:
        draft.set(f"hyperparameters.extra.{key}", draft.take_number(key), key)
    _optimizer_arguments(draft)
    checkpointing = draft.take("gradient_checkpointing")
    if checkpointing is not None:
        draft.set("hyperparameters.gradientCheckpointing", bool(checkpointing), "gradient_checkpointing")
        if isinstance(checkpointing, str):
            text = f"{checkpointing!r} is taken as true: where activations lie changes no result"
            draft.note(Kind.NOT_NEEDED, "gradient_checkpointing", text)


def _optimizer_arguments(draft: Draft) -> None:
    """Set what the optimizer takes by name, which Axolotl reads as text or as a mapping."""
    given = draft.take("optim_args")
    if isinstance(given, dict):
        given = ",".join(f"{name}={value}" for name, value in given.items())
    if isinstance(given, str):
        draft.set("hyperparameters.extra.optim_args", given, "optim_args")
    elif given is not None:
        draft.note(Kind.ERROR, "optim_args", f"must be text or a mapping, is {given!r}")


def _noise(draft: Draft, objective: ObjectiveType) -> None:
    for key in ("neftune_noise_alpha", "noisy_embedding_alpha"):
        alpha = draft.take_number(key)
        if alpha and objective == "SFT":
            draft.set("hyperparameters.neftuneNoiseAlpha", alpha, key)
        elif alpha is not None:
            draft.note(Kind.NOT_NEEDED, key, "only for supervised fine-tuning" if alpha else "off, as here")


def _sampling(draft: Draft, objective: ObjectiveType) -> None:
    if not draft.take_flag("group_by_length"):
        return
    if objective == "SFT" and not draft.spec["hyperparameters"].get("packing"):
        draft.set("hyperparameters.extra.train_sampling_strategy", "group_by_length", "group_by_length")
    else:
        draft.note(Kind.NOT_CONVERTED, "group_by_length", "rows are drawn in random order")
