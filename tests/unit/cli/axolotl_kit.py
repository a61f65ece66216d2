"""The smallest Axolotl configuration, and what becomes of it with some keys changed."""

from __future__ import annotations

from typing import Any

from tunewright_cli.axolotl.convert import Conversion, convert
from tunewright_cli.axolotl.draft import Kind

ALPACA = {"path": "s3://datasets/rows.jsonl", "type": "alpaca"}
CHAT = {"path": "s3://datasets/rows.jsonl", "type": "chat_template"}
LORA = {"adapter": "lora", "lora_r": 8, "lora_target_linear": True}
BASE: dict[str, Any] = {"base_model": "org/model", "datasets": [ALPACA], **LORA}


EVALUATED: dict[str, Any] = {"val_set_size": 0.1, "eval_steps": 10}
BEST: dict[str, Any] = {**EVALUATED, "load_best_model_at_end": True}
PER_EPOCH: dict[str, Any] = {"val_set_size": 0.1, "num_epochs": 3, "evals_per_epoch": 4, "saves_per_epoch": 1}
CYCLES: dict[str, Any] = {"lr_scheduler_kwargs": {"num_cycles": 3}}
MLFLOW: dict[str, Any] = {"mlflow_tracking_uri": "https://mlflow.example.com", "mlflow_experiment_name": "a"}
DPO: dict[str, Any] = {"rl": "dpo", "datasets": [{**CHAT, "type": "chat_template.argilla_chat"}]}
REWARD: dict[str, Any] = {"reward_model": True, "datasets": [{**CHAT, "type": "bradley_terry.chat_template"}]}
TRL: dict[str, Any] = {"reward_funcs": ["my.reward"], "num_generations": 2}
GRPO: dict[str, Any] = {"rl": "grpo", "micro_batch_size": 4}


def converted(**changes: Any) -> dict[str, Any]:
    """Return the spec that the smallest configuration becomes with some keys changed."""
    document = convert({**BASE, **changes}, "name").document
    assert document is not None
    spec: dict[str, Any] = document["spec"]
    return spec


def rows(**changes: Any) -> dict[str, Any]:
    """Return the spec for chats with some keys of the data set changed."""
    return converted(datasets=[{**CHAT, **changes}])


def said(conversion: Conversion, kind: Kind) -> dict[str, str]:
    """Return what is said, by path."""
    return {note.path: note.text for note in conversion.notes if note.kind is kind}


def errors(**changes: Any) -> dict[str, str]:
    """Return the errors of the smallest configuration with some keys changed, by path."""
    conversion = convert({**BASE, **changes}, "name")
    assert conversion.document is None
    return said(conversion, Kind.ERROR)
