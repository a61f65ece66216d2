"""Updates of existing objects: which fields may change."""

from __future__ import annotations

from dataclasses import dataclass

from tests.rule_cases.case import Case, Document
from tunewright_api.v1alpha1.adaptermerge import MERGE_IMMUTABLE_MESSAGE
from tunewright_api.v1alpha1.finetunejob import IMMUTABLE_MESSAGE


@dataclass(frozen=True)
class Update:
    """A merge patch to the spec of the object that `before` is."""

    name: str
    accepted: bool
    patch: Document
    before: Case
    part: str = ""


def _updates(before: Case, changed: Document, message: str) -> tuple[Update, ...]:
    """Return updates of every field that cannot change: other content, none at all, and the same again."""
    spec = before.document()["spec"]
    optional = [name for name in before.changes if name != "adapters"]
    return (
        Update("suspend", True, {"suspend": True}, before),
        Update("retry", True, {"retry": {"maxRestarts": 9, "timeouts": {"run": "1h"}}}, before),
        Update("ttl", True, {"ttlAfterFinished": "1h"}, before),
        *(
            Update(f"change {name}", False, {name: change}, before, f"spec.{name} {message}")
            for name, change in changed.items()
        ),
        *(Update(f"remove {name}", False, {name: None}, before, f"spec.{name} {message}") for name in optional),
        *(Update(f"keep {name}", True, {name: spec[name]}, before) for name in changed),
    )


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

_MERGE_BEFORE: Document = {
    "base": {"uri": "hf://organisation/name"},
    "combination": {"type": "TIES", "density": 0.4},
    "quantizedBase": "Dequantized",
    "dtype": "Float16",
    "maxShardSize": "1GB",
    "verification": {"prompts": ["Hello"]},
    "export": {"gguf": ["Q8_0"]},
    "storage": {"region": "us-east-1"},
    "hub": {"secretName": "a"},
    "resources": {"cpu": "1"},
    "pod": {"image": "a"},
}
_MERGE_CHANGED: Document = {
    "base": {"uri": "hf://other/name"},
    "adapters": [{"uri": "s3://models/a"}, {"uri": "s3://models/c"}],
    "combination": {"density": 0.3},
    "quantizedBase": "Original",
    "dtype": "Float32",
    "maxShardSize": "2GB",
    "verification": {"maxDivergence": 0.1},
    "export": {"gguf": ["F16"]},
    "output": {"uri": "s3://models/other"},
    "storage": {"region": "eu-west-1"},
    "hub": {"secretName": "b"},
    "resources": {"cpu": "2"},
    "pod": {"image": "b"},
}

BEFORE = Case("before updates", True, _BEFORE, job_name="updated")
MERGE_BEFORE = Case(
    "merge before updates",
    True,
    {**_MERGE_BEFORE, "adapters": [{"uri": "s3://models/a"}, {"uri": "s3://models/b"}]},
    job_name="updated",
    kind="AdapterMerge",
)
UPDATES = (
    *_updates(BEFORE, _CHANGED, IMMUTABLE_MESSAGE),
    Update(
        "change a further argument",
        False,
        {"hyperparameters": {"extra": {"adam_beta2": 0.9}}},
        BEFORE,
        f"spec.hyperparameters {IMMUTABLE_MESSAGE}",
    ),
    *_updates(MERGE_BEFORE, _MERGE_CHANGED, MERGE_IMMUTABLE_MESSAGE),
)
"""Immutability, a matter of the server alone."""
