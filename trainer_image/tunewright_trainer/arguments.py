"""The run document as TRL's arguments."""

from __future__ import annotations

from pathlib import Path

import torch
from trl import SFTConfig

from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.parts import Optimizer, Scheduler
from tunewright_trainer.hardware import Precision

_OPTIMIZERS: dict[Optimizer, str] = {
    "AdamW": "adamw_torch_fused",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "PagedAdamW32bit": "paged_adamw_32bit",
    "Adafactor": "adafactor",
}
_SCHEDULERS: dict[Scheduler, str] = {
    "Cosine": "cosine",
    "Linear": "linear",
    "Constant": "constant",
    "ConstantWithWarmup": "constant_with_warmup",
}
_STRATEGIES = {"Epoch": "epoch", "Steps": "steps", "None": "no"}


def sft_config(run: TrainRun, precision: Precision, *, on_gpu: bool, scratch: Path, evaluates: bool) -> SFTConfig:
    """Return the arguments of the trainer.

    Args:
        run: The run document.
        precision: Number formats; products are computed in `precision.compute` by autocast.
        on_gpu: Trains on a GPU.
        scratch: Folder the trainer may create; nothing is written into it.
        evaluates: There are validation rows.
    """
    given = run.hyperparameters
    return SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=given.epochs or 1.0,
        max_steps=given.max_steps or -1,
        learning_rate=given.learning_rate,
        lr_scheduler_type=_SCHEDULERS[given.scheduler],
        warmup_steps=given.warmup_ratio,  # below 1 it is a share of the steps
        per_device_train_batch_size=given.batch_size,
        per_device_eval_batch_size=given.batch_size,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        optim=_OPTIMIZERS[given.optimizer],
        weight_decay=given.weight_decay,
        max_grad_norm=given.max_grad_norm,
        # TRL's default for the old name is True; without None it would win over the new one.
        gradient_checkpointing=None,
        activation_checkpointing=given.gradient_checkpointing,
        seed=given.seed,
        data_seed=given.seed,
        use_cpu=not on_gpu,
        bf16=precision.compute is torch.bfloat16,
        fp16=precision.compute is torch.float16,
        max_length=given.max_sequence_length,
        packing=given.packing,
        eval_packing=False,  # the evaluation loss does not depend on how training rows are packed
        dataset_kwargs={"skip_prepare_dataset": True},  # rows arrive tokenised, cut and packed
        eval_strategy=_STRATEGIES[run.evaluation.strategy] if evaluates else "no",
        eval_steps=run.evaluation.steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not replaced by an average
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
