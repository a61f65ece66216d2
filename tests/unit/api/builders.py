"""Builders of valid documents, to be changed by a test where it matters."""

from __future__ import annotations

from typing import Any

from tunewright_api.v1alpha1.adaptermerge import AdapterMergeSpec
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec

Document = dict[str, Any]


def spec_document(**changes: Any) -> Document:
    """Return the smallest valid spec; a change of None removes the field."""
    document: Document = {
        "model": {"uri": "hf://organisation/name"},
        "dataset": {"train": [{"uri": "s3://bucket/train.jsonl"}]},
        "method": {"type": "LoRA"},
        "output": {"uri": "s3://bucket/output"},
        **changes,
    }
    return {key: value for key, value in document.items() if value is not None}


def job_document(name: str = "support-bot", **changes: Any) -> Document:
    """Return the smallest valid FineTuneJob with changes to its spec."""
    return {
        "apiVersion": "tunewright.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": spec_document(**changes),
    }


def spec(**changes: Any) -> FineTuneJobSpec:
    """Return the smallest valid spec, parsed."""
    return FineTuneJobSpec.model_validate(spec_document(**changes))


def merge_document(name: str = "support-bot", **changes: Any) -> Document:
    """Return the smallest valid AdapterMerge with changes to its spec; a change of None removes the field."""
    spec = {"adapters": [{"uri": "s3://bucket/adapter"}], "output": {"uri": "s3://bucket/merged"}, **changes}
    return {
        "apiVersion": "tunewright.dev/v1alpha1",
        "kind": "AdapterMerge",
        "metadata": {"name": name},
        "spec": {key: value for key, value in spec.items() if value is not None},
    }


def merge_spec(**changes: Any) -> AdapterMergeSpec:
    """Return the smallest valid spec of an AdapterMerge, parsed."""
    return AdapterMergeSpec.model_validate(merge_document(**changes)["spec"])
