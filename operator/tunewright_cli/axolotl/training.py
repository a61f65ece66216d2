"""Training arguments and evaluation."""

from __future__ import annotations

import math
from typing import Any

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

_SCHEDULERS = {
    "cosine": "Cosine",
    "linear": "Linear",
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
}
_WARMUP_RATIO = 0.03
"""What Axolotl warms up for where nothing is said, up to 100 steps."""


def convert_training(draft: Draft) -> None:
    """Set hyperparameters and evaluation; the data must be there already."""
    _as_they_stand(draft)
    _schedule(draft)
    _batches(draft)
    _optimizer(draft)
    _evaluation(draft)


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
    checkpointing = draft.take("gradient_checkpointing")
    if checkpointing is not None:
        draft.set("hyperparameters.gradientCheckpointing", bool(checkpointing), "gradient_checkpointing")
        if isinstance(checkpointing, str):
            text = f"{checkpointing!r} is taken as true: where activations lie changes no result"
            draft.note(Kind.NOT_NEEDED, "gradient_checkpointing", text)


def _evaluation(draft: Draft) -> None:
    per_epoch, every = draft.take_number("evals_per_epoch"), draft.take_number("eval_steps")
    keys = ("eval_strategy", "evaluation_strategy")
    strategies = {key: value for key in keys if (value := draft.take(key)) is not None}
    given = {"evals_per_epoch": per_epoch, "eval_steps": every, **strategies}
    dataset = draft.spec.get("dataset", {})
    if not dataset.get("validation") and not dataset.get("validationFraction"):
        for key, value in given.items():
            if value is not None:
                draft.note(Kind.NOT_NEEDED, key, "there are no validation rows")
        return
    # kubectl's YAML, like PyYAML's, reads a bare no as false.
    if any(value in ("no", False) for value in strategies.values()):
        draft.set("evaluation.strategy", "None", "eval_strategy")
    elif every is not None and every >= 1:
        draft.set("evaluation.strategy", "Steps", "eval_steps")
        draft.set("evaluation.steps", int(every), "eval_steps")
    elif every is not None or per_epoch not in (None, 0, 1):
        key = "eval_steps" if every is not None else "evals_per_epoch"
        text = "evaluated once per epoch; for more, set evaluation.strategy to Steps and evaluation.steps"
        draft.note(Kind.NOT_CONVERTED, key, text)
