"""The one table of defaults: a pure function of the spec."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunewright_api.base import SpecModel
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec, Resources
from tunewright_api.v1alpha1.parts import LoRA, MethodType, Optimizer, Scheduler

LEARNING_RATE: dict[MethodType, float] = {"Full": 2e-5, "LoRA": 2e-4, "QLoRA": 2e-4}
"""Adapters start from zero and are small, so they take ten times the rate of full fine-tuning (Hu et al. 2021)."""


class ResolvedHyperparameters(SpecModel):
    """Training arguments with nothing left open. Exactly one of `epochs` and `max_steps` is set."""

    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float
    scheduler: Scheduler
    warmup_ratio: float
    batch_size: int
    gradient_accumulation_steps: int
    max_sequence_length: int
    packing: bool
    optimizer: Optimizer
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    seed: int


class ResolvedLoRA(SpecModel):
    """Adapter settings with nothing left open. `targets` is None when `target_modules` names the layers."""

    rank: int
    alpha: int
    dropout: float
    targets: Literal["AllLinear", "Attention", "QueryValue"] | None
    target_modules: list[str] | None = Field(default=None)


class ResolvedEvaluation(SpecModel):
    """When to evaluate. `steps` is set for strategy Steps."""

    strategy: Literal["Epoch", "Steps", "None"]
    steps: int | None = None


def resolve_hyperparameters(spec: FineTuneJobSpec) -> ResolvedHyperparameters:
    """Fill every training argument that the spec leaves out."""
    given = {} if spec.hyperparameters is None else spec.hyperparameters.model_dump(exclude_none=True)
    on_gpu = (spec.resources or Resources()).gpus > 0
    method = spec.method.type
    scheduler = given.get("scheduler", "Cosine")
    defaults = {
        "epochs": None if "max_steps" in given else 1.0,
        "max_steps": None,
        "learning_rate": LEARNING_RATE[method],
        "scheduler": scheduler,
        "warmup_ratio": 0.0 if scheduler == "Constant" else 0.06,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_sequence_length": 1024,
        "packing": False,
        # Paged 8-bit states are what lets a quantized 7B model train on one small GPU (Dettmers et al. 2023).
        "optimizer": "PagedAdamW8bit" if method == "QLoRA" and on_gpu else "AdamW",
        "weight_decay": 0.0,
        "max_grad_norm": 0.3 if method == "QLoRA" else 1.0,
        "gradient_checkpointing": on_gpu,
        "seed": 42,
    }
    return ResolvedHyperparameters.model_validate({**defaults, **given})


def resolve_lora(spec: FineTuneJobSpec) -> ResolvedLoRA | None:
    """Fill the adapter settings; None for full fine-tuning."""
    if spec.method.type == "Full":
        return None
    lora = spec.method.lora or LoRA()
    return ResolvedLoRA(
        rank=lora.rank,
        alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,
        dropout=lora.dropout,
        targets=lora.targets or (None if lora.target_modules else "AllLinear"),
        target_modules=lora.target_modules,
    )


def resolve_evaluation(spec: FineTuneJobSpec) -> ResolvedEvaluation:
    """Evaluate per epoch wherever there are rows to evaluate on, unless told otherwise."""
    has_rows = spec.dataset.validation is not None or spec.dataset.validation_fraction is not None
    if spec.evaluation is None or spec.evaluation.strategy is None:
        return ResolvedEvaluation(strategy="Epoch" if has_rows else "None")
    return ResolvedEvaluation(strategy=spec.evaluation.strategy, steps=spec.evaluation.steps)
