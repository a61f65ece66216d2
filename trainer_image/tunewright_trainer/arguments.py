"""The run document as arguments of TRL's and transformers' trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.objective import DPO, KTO, PreferenceLoss, Reward
from tunewright_api.v1alpha1.parts import Optimizer, Scheduler
from tunewright_api.v1alpha1.reinforcement import GRPO
from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.hardware import Precision

_OPTIMIZERS: dict[Optimizer, str] = {
    "AdamW": "adamw_torch_fused",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "PagedAdamW32bit": "paged_adamw_32bit",
    "Adafactor": "adafactor",
    "Lion": "lion_32bit",
    "SGD": "sgd",
}
_SCHEDULERS: dict[Scheduler, str] = {
    "Cosine": "cosine",
    "CosineWithRestarts": "cosine_with_restarts",
    "Linear": "linear",
    "Polynomial": "polynomial",
    "InverseSqrt": "inverse_sqrt",
    "Constant": "constant",
    "ConstantWithWarmup": "constant_with_warmup",
}
_SCHEDULER_ARGUMENTS = {"CosineWithRestarts": {"num_cycles": 4}}  # transformers' default of 1 is plain Cosine
_STRATEGIES = {"Epoch": "epoch", "Steps": "steps", "None": "no"}


_LOSSES: dict[PreferenceLoss, str] = {
    "Sigmoid": "sigmoid",
    "Hinge": "hinge",
    "IPO": "ipo",
    "EXOPair": "exo_pair",
    "NCAPair": "nca_pair",
    "Robust": "robust",
    "BCOPair": "bco_pair",
    "SPPOHard": "sppo_hard",
    "AOT": "aot",
    "AOTUnpaired": "aot_unpaired",
    "APOZero": "apo_zero",
    "APODown": "apo_down",
    "DiscoPOP": "discopop",
}
_KTO_LOSSES = {"KTO": "kto", "APOZeroUnpaired": "apo_zero_unpaired"}
_GRPO_LOSSES = {"DAPO": "dapo", "GRPO": "grpo", "DrGRPO": "dr_grpo", "BNPO": "bnpo"}


def common_arguments(
    run: TrainRun, precision: Precision, *, on_gpu: bool, scratch: Path, evaluates: bool
) -> dict[str, Any]:
    """Return the arguments that transformers' and TRL's trainers have in common.

    Args:
        run: The run document.
        precision: Number formats; products are computed in `precision.compute` by autocast.
        on_gpu: Trains on a GPU.
        scratch: Folder the trainer may create; nothing is written into it.
        evaluates: There are validation rows.
    """
    given = run.hyperparameters
    return {
        "output_dir": str(scratch),
        "num_train_epochs": given.epochs or 1.0,
        "max_steps": given.max_steps or -1,
        "learning_rate": given.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[given.scheduler],
        "lr_scheduler_kwargs": _SCHEDULER_ARGUMENTS.get(given.scheduler),
        "warmup_steps": given.warmup_ratio,  # below 1 it is a share of the steps
        "per_device_train_batch_size": given.batch_size,
        "per_device_eval_batch_size": given.batch_size,
        "gradient_accumulation_steps": given.gradient_accumulation_steps,
        "optim": _OPTIMIZERS[given.optimizer],
        "weight_decay": given.weight_decay,
        "max_grad_norm": given.max_grad_norm,
        # TRL's default for the old name is True; without None it would win over the new one.
        "gradient_checkpointing": None,
        "activation_checkpointing": given.gradient_checkpointing,
        "seed": given.seed,
        "data_seed": given.seed,
        "use_cpu": not on_gpu,
        "bf16": precision.compute is torch.bfloat16,
        "fp16": precision.compute is torch.float16,
        "eval_strategy": _STRATEGIES[run.evaluation.strategy] if evaluates else "no",
        "eval_steps": run.evaluation.steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a NaN loss must be seen, not replaced by an average
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        # What is trained has a gradient in every step; a search for what has none would cost a walk over the graph.
        "ddp_find_unused_parameters": False,
        "neftune_noise_alpha": given.neftune_noise_alpha,
        **(given.extra or {}),
    }


def check_extra(run: TrainRun, common: dict[str, Any]) -> None:
    """Refuse values of `hyperparameters.extra` that transformers or TRL refuse, before any weight is loaded.

    Raises:
        InvalidConfiguration: With what is wrong.
    """
    if run.objective.type == "KTO" and common.get("train_sampling_strategy", "sequential") != "sequential":
        raise InvalidConfiguration(
            "hyperparameters.extra: train_sampling_strategy is sequential for KTO, whose loss compares neighbours"
        )
    try:
        classification_arguments(common)
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidConfiguration(f"hyperparameters.extra: {error}") from None


def sft_config(run: TrainRun, common: dict[str, Any], *, packing: bool) -> SFTConfig:
    """Return the arguments of supervised fine-tuning; `packing` makes TRL lay a batch out as one sequence."""
    return SFTConfig(
        **common,
        max_length=run.hyperparameters.max_sequence_length,
        packing=packing,
        eval_packing=False,  # the evaluation loss does not depend on how training rows are packed
        dataset_kwargs={"skip_prepare_dataset": True},  # rows arrive tokenised, cut and packed
    )


def dpo_config(run: TrainRun, settings: DPO, common: dict[str, Any]) -> DPOConfig:
    """Return the arguments of direct preference optimization."""
    return DPOConfig(
        **common,
        beta=settings.beta,
        loss_type=[_LOSSES[settings.loss]],
        label_smoothing=settings.label_smoothing,
        max_length=run.hyperparameters.max_sequence_length,
    )


def kto_config(run: TrainRun, settings: KTO, common: dict[str, Any]) -> KTOConfig:
    """Return the arguments of Kahneman-Tversky optimization."""
    return KTOConfig(
        **common,
        beta=settings.beta,
        loss_type=_KTO_LOSSES[settings.loss],
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        max_length=run.hyperparameters.max_sequence_length,
    )


def reward_config(run: TrainRun, settings: Reward, common: dict[str, Any]) -> RewardConfig:
    """Return the arguments of a reward model's training."""
    return RewardConfig(
        **common,
        center_rewards_coefficient=settings.center_rewards,
        max_length=run.hyperparameters.max_sequence_length,
    )


def grpo_config(run: TrainRun, settings: GRPO, common: dict[str, Any]) -> GRPOConfig:
    """Return the arguments of group relative policy optimization."""
    rows = run.hyperparameters.batch_size
    return GRPOConfig(
        **{
            **common,
            # An evaluation batch holds whole groups as well; without gradients there is room for one in any case.
            "per_device_eval_batch_size": max(1, rows // settings.generations) * settings.generations,
        },
        num_generations=settings.generations,
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        beta=settings.beta,
        epsilon=settings.epsilon,
        loss_type=_GRPO_LOSSES[settings.loss],
        # Liu et al. 2025: dividing by the deviation favours prompts that are nearly always or nearly never solved.
        scale_rewards="none" if settings.loss == "DrGRPO" else "group",
        reward_weights=[reward.weight for reward in settings.rewards],
    )


def ppo_arguments(common: dict[str, Any]) -> TrainingArguments:
    """Return the arguments of proximal policy optimization, whose steps are rollouts."""
    return TrainingArguments(**{**common, "gradient_checkpointing": False})


def classification_arguments(common: dict[str, Any]) -> TrainingArguments:
    """Return the arguments of a classifier's training; TRL's trainers count tokens by themselves."""
    own = {"gradient_checkpointing": False, "include_num_input_tokens_seen": "non_padding"}
    return TrainingArguments(**{**common, **own})
