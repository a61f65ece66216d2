"""The training that the worker is measured against: a plain TRL script with the same arguments, as a user writes it.

python bench/trainer/plain_trl.py MODEL ROWS STEPS BATCH TOKENS DTYPE SCRATCH; prints one line of JSON at the end.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_path, rows_path, steps, batch, tokens, dtype, scratch = sys.argv[1:]
torch_dtype = {"BFloat16": torch.bfloat16, "Float32": torch.float32}[dtype]


class StepTimes(TrainerCallback):
    """Takes the time of a step where the worker's callback takes it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.began = time.monotonic()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Stop it."""
        if logs is not None and "loss" in logs:
            self.seconds.append(time.monotonic() - self.began)


rows = [json.loads(line) for line in Path(rows_path).read_text().splitlines()]
chats = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in rows
]
times = StepTimes()
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch_dtype),
    processing_class=AutoTokenizer.from_pretrained(model_path),
    train_dataset=Dataset.from_list(chats),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=scratch,
        max_steps=int(steps),
        per_device_train_batch_size=int(batch),
        max_length=int(tokens),
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.06,
        logging_steps=1,
        seed=42,
        data_seed=42,
        use_cpu=True,
        bf16=dtype == "BFloat16",
        gradient_checkpointing=None,
        activation_checkpointing=False,
        save_strategy="no",
        report_to="none",
    ),
    callbacks=[times],
)
began = time.monotonic()
trainer.train()
print(
    json.dumps(
        {
            "train_seconds": time.monotonic() - began,
            "step_seconds": times.seconds,
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "tokens": [log["num_tokens"] for log in trainer.state.log_history if "loss" in log],
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
