"""Cases of every validation rule: pydantic (`tests/unit/api/test_rules.py`) and the API server
(`tests/integration/test_crd.py`) must give the same verdict on each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from tunewright_api.base import Rule, SpecModel
from tunewright_api.v1alpha1.finetunejob import IMMUTABLE_MESSAGE

Document = dict[str, Any]

_TRAIN = [{"uri": "s3://datasets/train.jsonl"}]
_PREFIX = "tunewright.dev/"


@dataclass(frozen=True)
class Case:
    """A FineTuneJob that differs from a valid one in `changes`."""

    name: str
    accepted: bool
    changes: Document = field(default_factory=dict)
    """Top-level fields of the spec; None removes one."""
    part: str = ""
    """What a refusal must say, in Python and on the server: the rule's own message, or the field's path."""
    job_name: str = "case"

    def document(self) -> Document:
        """Return the FineTuneJob."""
        spec: Document = {
            "model": {"uri": "hf://organisation/name"},
            "dataset": {"train": _TRAIN},
            "method": {"type": "LoRA"},
            "output": {"uri": "s3://models/case"},
        }
        spec.update(copy.deepcopy(self.changes))
        return {
            "apiVersion": "tunewright.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": self.job_name},
            "spec": {key: value for key, value in spec.items() if value is not None},
        }


def _dataset(**more: Any) -> Document:
    return {"dataset": {"train": _TRAIN, **more}}


REVISION = "model.revision is only for hf:// models"
VALIDATION = "dataset.validation and dataset.validationFraction exclude each other"
TARGETS = "lora.targets and lora.targetModules exclude each other"
QUANT_BITS = "quantization.type and quantization.doubleQuant are only for bits: 4"
LORA_FULL = "method.lora is only for LoRA and QLoRA"
QLORA = "method.quantization belongs to QLoRA"
EPOCHS = "hyperparameters.epochs and hyperparameters.maxSteps exclude each other"
EVAL_STEPS = "evaluation.steps belongs to strategy Steps"
EVAL_ROWS = "evaluation needs rows to evaluate on"
NAME_LENGTH = "metadata.name may have at most 45 characters"
NAME_FORM = "metadata.name may have only lower-case letters"
POD_LABELS = "pod.labels may not start with tunewright.dev/"
POD_KEYS = "keys in pod.labels, pod.annotations and pod.nodeSelector are names"
POD_ANNOTATIONS = "pod.annotations may not start with tunewright.dev/"

RULES = (
    Case("hub model with revision", True, {"model": {"uri": "hf://a/b", "revision": "main"}}, REVISION),
    Case("bucket model with revision", False, {"model": {"uri": "s3://bucket/b", "revision": "main"}}, REVISION),
    Case("validation files", True, _dataset(validation=_TRAIN), VALIDATION),
    Case("validation fraction", True, _dataset(validationFraction=0.1), VALIDATION),
    Case("both validations", False, _dataset(validation=_TRAIN, validationFraction=0.1), VALIDATION),
    Case("target preset", True, {"method": {"type": "LoRA", "lora": {"targets": "Attention"}}}, TARGETS),
    Case("target modules", True, {"method": {"type": "LoRA", "lora": {"targetModules": ["q_proj"]}}}, TARGETS),
    Case(
        "both targets",
        False,
        {"method": {"type": "LoRA", "lora": {"targets": "Attention", "targetModules": ["q_proj"]}}},
        TARGETS,
    ),
    Case("4 bits with type", True, {"method": {"type": "QLoRA", "quantization": {"type": "NF4"}}}, QUANT_BITS),
    Case("8 bits", True, {"method": {"type": "QLoRA", "quantization": {"bits": 8}}}, QUANT_BITS),
    Case(
        "8 bits with type",
        False,
        {"method": {"type": "QLoRA", "quantization": {"bits": 8, "type": "NF4"}}},
        QUANT_BITS,
    ),
    Case(
        "8 bits with double quantization",
        False,
        {"method": {"type": "QLoRA", "quantization": {"bits": 8, "doubleQuant": True}}},
        QUANT_BITS,
    ),
    Case("full", True, {"method": {"type": "Full"}}, LORA_FULL),
    Case("full with adapter", False, {"method": {"type": "Full", "lora": {"rank": 8}}}, LORA_FULL),
    Case("QLoRA", True, {"method": {"type": "QLoRA", "quantization": {}, "lora": {"rank": 8}}}, QLORA),
    Case("QLoRA without quantization", False, {"method": {"type": "QLoRA"}}, QLORA),
    Case("LoRA with quantization", False, {"method": {"type": "LoRA", "quantization": {}}}, QLORA),
    Case("full with quantization", False, {"method": {"type": "Full", "quantization": {}}}, QLORA),
    Case("epochs", True, {"hyperparameters": {"epochs": 2.5}}, EPOCHS),
    Case("steps", True, {"hyperparameters": {"maxSteps": 10}}, EPOCHS),
    Case("epochs and steps", False, {"hyperparameters": {"epochs": 1.0, "maxSteps": 10}}, EPOCHS),
    Case(
        "evaluation by steps",
        True,
        {**_dataset(validationFraction=0.1), "evaluation": {"strategy": "Steps", "steps": 5}},
        EVAL_STEPS,
    ),
    Case(
        "evaluation by steps without number",
        False,
        {**_dataset(validationFraction=0.1), "evaluation": {"strategy": "Steps"}},
        EVAL_STEPS,
    ),
    Case(
        "evaluation by epoch with number",
        False,
        {**_dataset(validationFraction=0.1), "evaluation": {"strategy": "Epoch", "steps": 5}},
        EVAL_STEPS,
    ),
    Case("evaluation with rows", True, {**_dataset(validation=_TRAIN), "evaluation": {"strategy": "Epoch"}}, EVAL_ROWS),
    Case("no evaluation", True, {"evaluation": {"strategy": "None"}}, EVAL_ROWS),
    Case("evaluation without rows", False, {"evaluation": {"strategy": "Epoch"}}, EVAL_ROWS),
    Case("name of 45 characters", True, part=NAME_LENGTH, job_name="n" * 45),
    Case("name of 46 characters", False, part=NAME_LENGTH, job_name="n" * 46),
    Case("name with hyphen", True, part=NAME_FORM, job_name="a-1"),
    Case("name with dot", False, part=NAME_FORM, job_name="a.b"),
    Case("pod label", True, {"pod": {"labels": {"team": "a", "example.org/x": "b"}}}, POD_LABELS),
    Case("reserved pod label", False, {"pod": {"labels": {f"{_PREFIX}attempt": "9"}}}, POD_LABELS),
    Case("pod annotation", True, {"pod": {"annotations": {"note": "free text, even long"}}}, POD_ANNOTATIONS),
    Case("reserved pod annotation", False, {"pod": {"annotations": {f"{_PREFIX}x": "9"}}}, POD_ANNOTATIONS),
    Case(
        "keys with and without a domain",
        True,
        {"pod": {"labels": {"team": "a"}, "annotations": {"example.com/x": "1"}, "nodeSelector": {"a.b/c-d_e": "x"}}},
        POD_KEYS,
    ),
    *(
        Case(f"bad key in {name}", False, {"pod": {name: {key: "x"}}}, POD_KEYS)
        for name, key in (("labels", "a b"), ("annotations", "/x"), ("nodeSelector", "a/b/c"))
    ),
)
"""Rules written as CEL on the server and as predicates in Python; `part` is the start of the rule's message."""


def _uris(what: str, path: str, wrap: Any, good: tuple[str, ...], bad: tuple[str, ...]) -> tuple[Case, ...]:
    accepted = tuple(Case(f"{what} {uri}", True, wrap(uri)) for uri in good)
    return accepted + tuple(Case(f"{what} {uri}", False, wrap(uri), path) for uri in bad)


URIS = (
    *_uris(
        "model",
        "model.uri",
        lambda uri: {"model": {"uri": uri}},
        ("hf://org/Name-1.0_x", "s3://bucket", "s3://bucket/prefix/", "s3://my.bucket-1/a/b=c", "pvc://claim/a/b"),
        ("org/name", "hf://org", "https://bucket/x", "s3://B/x", "s3://bucket/../x", "pvc://claim", "/local/path", ""),
    ),
    *_uris(
        "data",
        "dataset.train[0].uri",
        lambda uri: {"dataset": {"train": [{"uri": uri}]}},
        ("s3://bucket/train.jsonl", "pvc://claim/data/train.parquet"),
        ("hf://org/name", "s3://bucket", "s3://bucket/a/", "s3://bucket//a", "pvc://claim/.hidden", "file:///x"),
    ),
    *_uris(
        "output",
        "output.uri",
        lambda uri: {"output": {"uri": uri}},
        ("s3://bucket/prefix", "s3://bucket/prefix/", "pvc://claim/path"),
        ("s3://bucket", "hf://org/name", "s3://bucket/a b", "pvc://claim", "relative/path"),
    ),
)
"""Addresses, by the patterns of `tunewright_api.base`."""


SCHEMA = (
    Case("smallest", True),
    Case("no model", False, {"model": None}, "model"),
    Case("no data", False, {"dataset": {"train": []}}, "dataset.train"),
    Case("too many files", False, {"dataset": {"train": _TRAIN * 33}}, "dataset.train"),
    Case("unknown method", False, {"method": {"type": "Magic"}}, "method.type"),
    Case("number in quotes", False, {"hyperparameters": {"learningRate": "2e-4"}}, "hyperparameters.learningRate"),
    Case("learning rate of zero", False, {"hyperparameters": {"learningRate": 0}}, "hyperparameters.learningRate"),
    Case("whole number for a rate", True, {"hyperparameters": {"learningRate": 1}}),
    Case("fraction of one", False, _dataset(validationFraction=1.0), "dataset.validationFraction"),
    Case("two GPUs", False, {"resources": {"gpus": 2}}, "resources.gpus"),
    Case("cpu as number", True, {"resources": {"cpu": 4, "memory": "16Gi", "ephemeralStorage": "1.5Ti"}}),
    Case("bad quantity", False, {"resources": {"memory": "16 GB"}}, "resources.memory"),
    Case("timeouts", True, {"retry": {"maxRestarts": 0, "timeouts": {"queue": "90s", "run": "12h", "stall": "5m"}}}),
    Case("bad duration", False, {"retry": {"timeouts": {"run": "1.5h"}}}, "retry.timeouts.run"),
    Case("duration of zero", False, {"ttlAfterFinished": "0s"}, "ttlAfterFinished"),
    Case("endpoint", True, {"storage": {"endpoint": "http://10.0.0.1:9000", "secretName": "s3"}}),
    Case("endpoint without scheme", False, {"storage": {"endpoint": "minio:9000"}}, "storage.endpoint"),
    Case(
        "whole pod",
        True,
        {
            "pod": {
                "image": "registry:5000/trainer:1",
                "imagePullSecrets": [{"name": "registry"}],
                "serviceAccountName": "trainer",
                "nodeSelector": {"gpu": "a100"},
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "priorityClassName": "high",
                "runtimeClassName": "nvidia",
            }
        },
    ),
)
"""Bounds and types of the schema."""

CASES = (*RULES, *URIS, *SCHEMA)

UNKNOWN_FIELDS = (
    ({"hyperparameters": {"learningrate": 1e-4}}, "learningrate", "learningRate"),
    ({"outptu": {"uri": "s3://b/x"}}, "outptu", "output"),
    ({"pod": {"securityContext": {"privileged": True}}}, "securityContext", None),
    ({"pod": {"hostNetwork": True}}, "hostNetwork", None),
)
"""Misspelt or forbidden fields: changes, the field, and the name that is meant."""


@dataclass(frozen=True)
class Update:
    """A merge patch to the spec of an existing FineTuneJob."""

    name: str
    accepted: bool
    patch: Document
    part: str = ""


_BEFORE: Document = {
    "hyperparameters": {"epochs": 1.0},
    "evaluation": {"strategy": "None"},
    "storage": {"region": "us-east-1"},
    "resources": {"gpus": 1},
    "pod": {"image": "a"},
}
_CHANGED: Document = {
    "model": {"uri": "hf://other/name"},
    "dataset": {"format": "Text"},
    "method": {"type": "Full"},
    "output": {"uri": "s3://models/other"},
    "hyperparameters": {"epochs": 2.0},
    "evaluation": {"strategy": "Epoch"},
    "storage": {"region": "eu-west-1"},
    "resources": {"gpus": 0},
    "pod": {"image": "b"},
}

BEFORE = Case("before updates", True, _BEFORE, job_name="updated")
UPDATES = (
    Update("suspend", True, {"suspend": True}),
    Update("retry", True, {"retry": {"maxRestarts": 9, "timeouts": {"run": "1h"}}}),
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


def all_rules() -> list[Rule]:
    """Return every rule of the models."""
    found, line = [], [SpecModel]
    while line:
        model = line.pop()
        line.extend(model.__subclasses__())
        found.extend(model.__dict__.get("RULES", ()))
    return found
