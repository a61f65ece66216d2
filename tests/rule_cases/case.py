"""A case of a rule, and the parts that cases are made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

Document = dict[str, Any]

TRAIN = [{"uri": "s3://datasets/train.jsonl"}]
PREFIX = "tunewright.dev/"


_VALID: dict[str, Document] = {
    "FineTuneJob": {
        "model": {"uri": "hf://organisation/name"},
        "dataset": {"train": TRAIN},
        "method": {"type": "LoRA"},
        "output": {"uri": "s3://models/case"},
    },
    "AdapterMerge": {"adapters": [{"fineTuneJob": "other"}], "output": {"uri": "s3://models/case"}},
}
"""The smallest valid spec of each kind."""


@dataclass(frozen=True)
class Case:
    """An object that differs from a valid one of its kind in `changes`."""

    name: str
    accepted: bool
    changes: Document = field(default_factory=dict)
    """Top-level fields of the spec; None removes one."""
    part: str = ""
    """What a refusal must say, in Python and on the server: the rule's own message, or the field's path."""
    job_name: str = "case"
    kind: str = "FineTuneJob"

    @property
    def plural(self) -> str:
        """Name of the kind in paths of the API server."""
        return f"{self.kind.lower()}s"

    def document(self) -> Document:
        """Return the object."""
        spec = {**copy.deepcopy(_VALID[self.kind]), **copy.deepcopy(self.changes)}
        return {
            "apiVersion": "tunewright.dev/v1alpha1",
            "kind": self.kind,
            "metadata": {"name": self.job_name},
            "spec": {key: value for key, value in spec.items() if value is not None},
        }


def hub(**hub: Any) -> Document:
    """Return an output with a push to the Hub."""
    return {"output": {"uri": "s3://models/case", "hub": {"repository": "org/name", **hub}}}


def dataset(**more: Any) -> Document:
    """Return rows with further settings."""
    return {"dataset": {"train": TRAIN, **more}}


def continued(method: Document | None = None, objective: str = "SFT", **reference: str) -> Document:
    """Return what a run that goes on from an adapter has."""
    model = {"uri": "hf://organisation/name", "continueFrom": reference or {"fineTuneJob": "other"}}
    return {"model": model, "method": method or {"type": "LoRA"}, "objective": {"type": objective}}


def selecting(objective: str = "SFT", **evaluation: Any) -> Document:
    """Return an evaluation that could choose the best model."""
    return {**dataset(validationFraction=0.1), "objective": {"type": objective}, "evaluation": evaluation}


def dpo(**settings: Any) -> Document:
    """Return the objective DPO."""
    return {"objective": {"type": "DPO", "dpo": settings}}


def kto(**settings: Any) -> Document:
    """Return the objective KTO."""
    return {"objective": {"type": "KTO", "kto": settings}}


def grpo(*rewards: Document, **settings: Any) -> Document:
    """Return the objective GRPO."""
    return {"objective": {"type": "GRPO", "grpo": {"rewards": list(rewards or [{"type": "JSON"}]), **settings}}}


def ppo(**settings: Any) -> Document:
    """Return the objective PPO."""
    return {"objective": {"type": "PPO", "ppo": {"rewards": [{"type": "JSON"}], **settings}}}


def lengths(**settings: Any) -> Document:
    """Return the objective GRPO with a reward for length."""
    return grpo({"type": "Length", "length": settings})
