"""The training that the worker is measured against: a plain TRL script with the same arguments, as a user writes it.

python bench/trainer/plain_trl.py ARGUMENTS, a JSON object; prints one line of JSON at the end. A classifier is trained
by transformers alone: TRL has no trainer for it. Where `starts_with` names the events of another run, training waits
until that one's begins, so that both have the machine in the same state.
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
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

START_LIMIT_SECONDS = 300.0
Given = dict[str, Any]


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


def main() -> None:
    """Train as the arguments say."""
    given: Given = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(given["rows"]).read_text().splitlines()]
    set_seed(42)
    times = StepTimes()
    trainer = build(given, rows, times)
    if given["starts_with"]:
        wait_for(Path(given["starts_with"]))
    set_seed(42)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    logs = [log for log in trainer.state.log_history if "loss" in log]
    numbers = {
        "train_seconds": seconds,
        "step_seconds": times.seconds,
        "losses": [log["loss"] for log in logs],
        "tokens": [int(log.get("num_tokens", log.get("num_input_tokens_seen"))) for log in logs],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(numbers))


def wait_for(events: Path) -> None:
    """Wait until another run says that its training begins."""
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while not events.exists() or '"stage":"Training"' not in events.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{events}: no training began within {START_LIMIT_SECONDS:.0f} s")
        time.sleep(0.02)


def build(given: Given, rows: list[Given], times: StepTimes) -> Any:
    """Return the objective's trainer."""
    match given["objective"]:
        case "SFT":
            return language_model(SFTTrainer, SFTConfig, given, [completion(row) for row in rows], times)
        case "DPO":
            return language_model(DPOTrainer, DPOConfig, given, [preference(row) for row in rows], times)
        case "KTO":
            judged = [one for row in rows for one in taken_apart(row)]
            return language_model(KTOTrainer, KTOConfig, given, judged, times)
        case "GRPO":
            return grpo(given, [{"prompt": [turn("user", row["prompt"])]} for row in rows], times)
        case "Reward":
            return reward(given, [preference(row) for row in rows], times)
        case "Classification":
            return classification(given, rows, times)
        case other:
            raise ValueError(f"objective {other!r}: there is no plain script for it")


def language_model(trainer: Any, config: Any, given: Given, rows: list[Given], times: StepTimes) -> Any:
    """Return the trainer of SFT, DPO and KTO."""
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(given["model"], **loading(given)),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter(given),
        args=config(**common(given), **of_trl(), max_length=given["tokens"]),
        callbacks=[times],
    )


def grpo(given: Given, rows: list[Given], times: StepTimes) -> GRPOTrainer:
    """Return the trainer of GRPO with a reward for answers of a certain length."""
    target = given["settings"]["rewards"][0]["length"]["target"]

    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [max(0.0, 1.0 - abs(len(ids) - target) / target) for ids in completion_ids]

    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given["model"], **loading(given)),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        reward_funcs=[length],
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter(given),
        args=GRPOConfig(
            **common(given),
            **of_trl(),
            num_generations=given["settings"]["generations"],
            max_completion_length=given["settings"]["maxCompletionLength"],
        ),
        callbacks=[times],
    )


def reward(given: Given, rows: list[Given], times: StepTimes) -> RewardTrainer:
    """Return the trainer of a reward model."""
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=1, **loading(given)),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter(given, "SEQ_CLS"),
        args=RewardConfig(**common(given), **of_trl(), max_length=given["tokens"]),
        callbacks=[times],
    )


def classification(given: Given, rows: list[Given], times: StepTimes) -> Trainer:
    """Return the trainer of a classifier."""
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    names = sorted({row["label"] for row in rows})
    model = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=len(names), **loading(given))
    model.config.pad_token_id = tokenizer.pad_token_id
    data = Dataset.from_list([{"text": row["text"], "labels": names.index(row["label"])} for row in rows])

    def tokens_of(row: Given) -> Any:
        return tokenizer(row["text"], truncation=True, max_length=given["tokens"])

    return Trainer(
        model=get_peft_model(model, adapter(given, "SEQ_CLS")),
        args=TrainingArguments(**common(given), include_num_input_tokens_seen="non_padding"),
        train_dataset=data.map(tokens_of, remove_columns=["text"]),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[times],
    )


def common(given: Given) -> Given:
    """Return the arguments of every trainer; what is not named has the same default on both sides."""
    return {
        "output_dir": given["scratch"],
        "max_steps": given["steps"],
        "per_device_train_batch_size": given["batch"],
        "gradient_accumulation_steps": 1,
        "learning_rate": given["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.06,
        "max_grad_norm": 0.3 if given["method"] == "QLoRA" else 1.0,
        "logging_steps": 1,
        "seed": 42,
        "data_seed": 42,
        "use_cpu": True,
        "bf16": given["dtype"] == "BFloat16",
        "save_strategy": "no",
        "report_to": "none",
    }


def of_trl() -> Given:
    """Return how gradient checkpointing is left off in TRL, where it is on by default."""
    return {"gradient_checkpointing": None, "activation_checkpointing": False}


def loading(given: Given) -> Given:
    """Return how the model is loaded: weights that are trained as a whole in float32, as autocast wants them."""
    compute = {"BFloat16": torch.bfloat16, "Float32": torch.float32}[given["dtype"]]
    if given["method"] != "QLoRA":
        return {"dtype": torch.float32 if given["method"] == "Full" else compute}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    return {"dtype": compute, "quantization_config": quantization, "device_map": {"": "cpu"}}


def adapter(given: Given, task_type: str = "CAUSAL_LM") -> LoraConfig | None:
    """Return the adapter, None for full fine-tuning."""
    if given["method"] == "Full":
        return None
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type=task_type)


def turn(role: str, content: str) -> Given:
    """Return one turn of a chat."""
    return {"role": role, "content": content}


def completion(row: Given) -> Given:
    """Return a row of SFT as a chat."""
    return {"prompt": [turn("user", row["prompt"])], "completion": [turn("assistant", row["completion"])]}


def preference(row: Given) -> Given:
    """Return a pair as chats."""
    answers = {field: [turn("assistant", row[field])] for field in ("chosen", "rejected")}
    return {"prompt": [turn("user", row["prompt"])], **answers}


def taken_apart(row: Given) -> list[Given]:
    """Return a pair as a good and a bad answer."""
    pair = preference(row)
    return [
        {"prompt": pair["prompt"], "completion": pair[field], "label": field == "chosen"}
        for field in ("chosen", "rejected")
    ]


if __name__ == "__main__":
    main()
