"""The one table of defaults: a pure function of the spec."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunewright_api.base import SpecModel
from tunewright_api.extra import Extra
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec, Resources
from tunewright_api.v1alpha1.method import IA3, LoRA, MethodType, PrefixTuning, PromptTuning
from tunewright_api.v1alpha1.objective import DPO, KTO, SFT, Classification, Objective, ObjectiveType, Reward
from tunewright_api.v1alpha1.parts import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_GRADIENT_ACCUMULATION_STEPS,
    DEFAULT_MAX_SEQUENCE_LENGTH,
    EarlyStopping,
    Evaluation,
    Metric,
    Optimizer,
    Scheduler,
)

FULL_LEARNING_RATE: dict[ObjectiveType, float] = {
    "SFT": 2e-5,
    "DPO": 5e-7,
    "KTO": 5e-7,
    "Reward": 1e-5,
    "GRPO": 1e-6,
    "PPO": 1e-6,
    "Classification": 2e-5,
}
"""Preferences move a model that is good already: a hundredth of the rate it was tuned with (Rafailov et al. 2023)."""
ADAPTER_FACTOR = 10.0
"""Low-rank adapters start from zero and are small, so they take ten times the rate (Hu et al. 2021)."""
SMALL_ADAPTER_LEARNING_RATE: dict[MethodType, float] = {"PrefixTuning": 1e-2, "PromptTuning": 1e-2, "IA3": 5e-3}
"""A few thousand weights that start far from their goal (Lester et al. 2021, Liu et al. 2022)."""


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
    neftune_noise_alpha: float | None = None
    seed: int
    extra: Extra | None = None


class ResolvedLoRA(SpecModel):
    """Adapter settings with nothing left open. `targets` is None when `target_modules` names the layers."""

    rank: int
    alpha: int
    dropout: float
    targets: Literal["AllLinear", "Attention", "QueryValue"] | None
    target_modules: list[str] | None = Field(default=None)
    modules_to_save: list[str] | None = Field(default=None)
    bias: Literal["None", "All", "LoRAOnly"] = "None"
    use_rslora: bool = False
    use_dora: bool = False


class ResolvedEvaluation(SpecModel):
    """When to evaluate, and what follows from it. `steps` is set for strategy Steps; `metric` where it is needed."""

    strategy: Literal["Epoch", "Steps", "None"]
    steps: int | None = None
    load_best: Literal[True] | None = None
    early_stopping: EarlyStopping | None = None
    metric: Metric | None = None

    @property
    def selects(self) -> bool:
        """Tell whether evaluations decide on the result or on the end of training."""
        return self.metric is not None


def resolve_hyperparameters(spec: FineTuneJobSpec) -> ResolvedHyperparameters:
    """Fill every training argument that the spec leaves out."""
    given = {} if spec.hyperparameters is None else spec.hyperparameters.model_dump(exclude_none=True)
    on_gpu = (spec.resources or Resources()).gpus > 0
    method = spec.method.type
    objective = resolve_objective(spec).type
    scheduler = given.get("scheduler", "Cosine")
    defaults = {
        "epochs": None if "max_steps" in given else 1.0,
        "max_steps": None,
        "learning_rate": learning_rate(objective, method),
        "scheduler": scheduler,
        "warmup_ratio": 0.0 if scheduler == "Constant" else 0.06,
        "batch_size": DEFAULT_BATCH_SIZE,
        "gradient_accumulation_steps": DEFAULT_GRADIENT_ACCUMULATION_STEPS,
        "max_sequence_length": DEFAULT_MAX_SEQUENCE_LENGTH,
        "packing": False,
        # Paged 8-bit states are what lets a quantized 7B model train on one small GPU (Dettmers et al. 2023).
        "optimizer": "PagedAdamW8bit" if method == "QLoRA" and on_gpu else "AdamW",
        "weight_decay": 0.0,
        "max_grad_norm": 0.3 if method == "QLoRA" else 1.0,
        "gradient_checkpointing": on_gpu and method != "PrefixTuning",
        "seed": 42,
    }
    return ResolvedHyperparameters.model_validate({**defaults, **given})


def learning_rate(objective: ObjectiveType, method: MethodType) -> float:
    """Return the default peak learning rate."""
    if method == "Full":
        return FULL_LEARNING_RATE[objective]
    # Rounded: 2e-5 times 10 is not 2e-4 in binary.
    return SMALL_ADAPTER_LEARNING_RATE.get(method) or float(f"{FULL_LEARNING_RATE[objective] * ADAPTER_FACTOR:.3g}")


def resolve_objective(spec: FineTuneJobSpec) -> Objective:
    """Return the objective with the block of its type filled in."""
    given = spec.objective or Objective()
    match given.type:
        case "SFT":
            return Objective(type="SFT", sft=given.sft or SFT())
        case "DPO":
            return Objective(type="DPO", dpo=given.dpo or DPO())
        case "KTO":
            return Objective(type="KTO", kto=given.kto or KTO())
        case "Reward":
            return Objective(type="Reward", reward=given.reward or Reward())
        case "GRPO" | "PPO":
            return given
        case "Classification":
            return Objective(type="Classification", classification=given.classification or Classification())


def resolve_lora(spec: FineTuneJobSpec) -> ResolvedLoRA | None:
    """Fill the adapter settings; None for the other methods, and for an adapter that has its own already."""
    if spec.method.type not in ("LoRA", "QLoRA") or spec.model.continue_from is not None:
        return None
    lora = spec.method.lora or LoRA()
    return ResolvedLoRA(
        rank=lora.rank,
        alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,
        # A likelihood is compared with what it was before: dropout would move it where nothing was learned.
        dropout=lora.dropout if lora.dropout is not None else 0.0 if resolve_objective(spec).type == "PPO" else 0.05,
        targets=lora.targets or (None if lora.target_modules else "AllLinear"),
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def resolve_prefix_tuning(spec: FineTuneJobSpec) -> PrefixTuning | None:
    """Fill the settings of prefix tuning; None for the other methods."""
    return (spec.method.prefix_tuning or PrefixTuning()) if spec.method.type == "PrefixTuning" else None


def resolve_prompt_tuning(spec: FineTuneJobSpec) -> PromptTuning | None:
    """Fill the settings of prompt tuning; None for the other methods."""
    return (spec.method.prompt_tuning or PromptTuning()) if spec.method.type == "PromptTuning" else None


def resolve_ia3(spec: FineTuneJobSpec) -> IA3 | None:
    """Fill the settings of IA3; None for the other methods, and for an adapter that has its own already."""
    return (spec.method.ia3 or IA3()) if spec.method.type == "IA3" and spec.model.continue_from is None else None


def resolve_evaluation(spec: FineTuneJobSpec) -> ResolvedEvaluation:
    """Evaluate per epoch wherever there are rows to evaluate on, unless told otherwise."""
    has_rows = spec.dataset.validation is not None or spec.dataset.validation_fraction is not None
    given = spec.evaluation or Evaluation()
    # Who ends a run because it gets worse does not want the model that got worse.
    load_best = given.early_stopping is not None if given.load_best is None else given.load_best
    return ResolvedEvaluation(
        strategy=given.strategy or ("Epoch" if has_rows else "None"),
        steps=given.steps,
        load_best=True if load_best else None,
        early_stopping=given.early_stopping,
        metric=(given.metric or "Loss") if load_best or given.early_stopping else None,
    )
