"""TRL by itself, to compare the recipes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def losses_of_plain_trl(
    trainer: Any, config: Any, rows: list[dict[str, Any]], model: Path, folder: Path
) -> list[float]:
    """Train LoRA on chats with TRL's own preparation and the arguments of `make_task`, and return the losses.

    Args:
        trainer: TRL's class of the objective.
        config: Its class of arguments.
        rows: Conversational rows.
        model: Folder of the base model.
        folder: For TRL's files.
    """
    training = trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=config(
            output_dir=str(folder / "trl"), max_steps=4, per_device_train_batch_size=4, learning_rate=0.01,
            lr_scheduler_type="cosine", warmup_steps=0.06, max_length=128, logging_steps=1, seed=42, use_cpu=True,
            bf16=False, gradient_checkpointing=None, activation_checkpointing=False, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
    )  # fmt: skip
    training.train()
    return [log["loss"] for log in training.state.log_history if "loss" in log]
