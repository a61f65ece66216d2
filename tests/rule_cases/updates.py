"""Updates of an existing FineTuneJob: which fields may change."""

from __future__ import annotations

from dataclasses import dataclass

from tests.rule_cases.case import Case, Document
from tunewright_api.v1alpha1.finetunejob import IMMUTABLE_MESSAGE


@dataclass(frozen=True)
class Update:
    """A merge patch to the spec of an existing FineTuneJob."""

    name: str
    accepted: bool
    patch: Document
    part: str = ""


_BEFORE: Document = {
    "objective": {"type": "SFT"},
    "hyperparameters": {"epochs": 1.0, "extra": {"adam_beta2": 0.95}},
    "evaluation": {"strategy": "None"},
    "storage": {"region": "us-east-1"},
    "hub": {"secretName": "a"},
    "resources": {"gpus": 1},
    "pod": {"image": "a"},
    "tracking": {"tensorboard": True},
}
_CHANGED: Document = {
    "model": {"uri": "hf://other/name"},
    "dataset": {"format": "Text"},
    "objective": {"type": "DPO"},
    "method": {"type": "Full"},
    "output": {"uri": "s3://models/other"},
    "hyperparameters": {"epochs": 2.0},
    "evaluation": {"strategy": "Epoch"},
    "storage": {"region": "eu-west-1"},
    "hub": {"secretName": "b"},
    "resources": {"gpus": 0},
    "pod": {"image": "b"},
    "tracking": {"tensorboard": False},
}

BEFORE = Case("before updates", True, _BEFORE, job_name="updated")
UPDATES = (
    Update("suspend", True, {"suspend": True}),
    Update("retry", True, {"retry": {"maxRestarts": 9, "timeouts": {"run": "1h"}}}),
    Update(
        "change a further argument",
        False,
        {"hyperparameters": {"extra": {"adam_beta2": 0.9}}},
        f"spec.hyperparameters {IMMUTABLE_MESSAGE}",
    ),
    Update("ttl", True, {"ttlAfterFinished": "1h"}),
    *(
        Update(f"change {name}", False, {name: change}, f"spec.{name} {IMMUTABLE_MESSAGE}")
        for name, change in _CHANGED.items()
    ),
    *(Update(f"remove {name}", False, {name: None}, f"spec.{name} {IMMUTABLE_MESSAGE}") for name in _BEFORE),
    *(Update(f"keep {name}", True, {name: value}) for name, value in _BEFORE.items()),
    *(
        Update(f"keep {name}", True, {name: BEFORE.document()["spec"][name]})
        for name in ("model", "dataset", "method", "output")
    ),
)
"""Immutability, a matter of the server alone."""
