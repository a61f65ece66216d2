"""The rows of the table: what is trained, by tunewright and by a plain script with the same arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
LENGTH_REWARD = 20
"""Tokens that GRPO rewards an answer for."""


@dataclass(frozen=True)
class Row:
    """One row. Steps and batch are chosen so that a step takes 0.3 to 3 s on one core.

    Attributes:
        name: What --rows takes.
        objective: As in the spec.
        method: As in the spec.
        data: File of rows.
        learning_rate: The default of objective and method.
        steps: Optimizer steps per run; the first is not counted.
        batch: Rows per step; for GRPO answers.
        tokens: Length that rows are cut to.
        pairs: Pairs of runs; even, so that each side has each core as often.
        settings: Block of the objective in the spec; the plain script reads what it needs.
        dataset: Further fields of the spec's data set.
    """

    name: str
    objective: str
    method: str
    data: Path
    learning_rate: float
    steps: int = 8
    batch: int = 2
    tokens: int = 128
    pairs: int = 4
    settings: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)

    @property
    def against(self) -> str:
        """Name of the other side."""
        return "plain transformers" if self.objective == "Classification" else "plain TRL"


PROMPTS, JUDGED, LABELLED = (DATA / f"{kind}-train.jsonl" for kind in ("docstrings", "preference", "labelled"))
HEADLINE = "sft-lora"
PACKING = "packing"
ROWS = (
    Row(HEADLINE, "SFT", "LoRA", PROMPTS, 2e-4, steps=12, pairs=8),
    Row("sft-full", "SFT", "Full", PROMPTS, 2e-5),
    Row("sft-qlora", "SFT", "QLoRA", PROMPTS, 2e-4),
    Row("dpo-lora", "DPO", "LoRA", JUDGED, 5e-6),
    Row("kto-lora", "KTO", "LoRA", JUDGED, 5e-6),
    Row("reward-lora", "Reward", "LoRA", JUDGED, 1e-4),
    Row("classification-lora", "Classification", "LoRA", LABELLED, 2e-4, batch=8),
    Row(
        "grpo-lora",
        "GRPO",
        "LoRA",
        PROMPTS,
        1e-5,
        steps=5,
        batch=4,
        settings={
            "rewards": [{"type": "Length", "length": {"target": LENGTH_REWARD}}],
            "generations": 4,
            "maxCompletionLength": 16,
        },
        dataset={"format": "Prompts"},
    ),
)
"""All rows but packing, which is compared with the same run without packing (bench.trainer.packing)."""
NAMES = (*(row.name for row in ROWS), PACKING)
