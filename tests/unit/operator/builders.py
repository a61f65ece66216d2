"""Builders of what decisions are made from; a test names only what matters to it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.api.builders import job_document, merge_document
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge
from tunewright_api.v1alpha1.finetunejob import FineTuneJob
from tunewright_api.v1alpha1.status import JobRef, RunStatus
from tunewright_api.validation import parse_adaptermerge, parse_finetunejob
from tunewright_operator import naming
from tunewright_operator.kinds import FINETUNEJOB, Kind, Workload, kind_of
from tunewright_operator.observed import ObservedJob, ObservedPod, ObservedRun
from tunewright_operator.settings import Settings
from tunewright_operator.status import decide

NOW = datetime.datetime(2026, 1, 1, 12, 0, 0, tzinfo=datetime.UTC)
TIME = "2026-01-01T12:00:00Z"
SETTINGS = Settings(trainer_image="trainer:1")

REPORT: dict[str, Any] = {
    "exitCode": 0,
    "reason": "Succeeded",
    "step": 10,
    "runKey": "0123456789abcdef",
    "output": {
        "uri": "s3://bucket/output/0123456789abcdef/01234567/adapter",
        "manifestUri": "s3://bucket/output/0123456789abcdef/manifest.json",
        "digest": "sha256:" + "0" * 64,
        "sizeBytes": 1,
    },
}


def later(seconds: float) -> datetime.datetime:
    """Return a time after `NOW`."""
    return NOW + datetime.timedelta(seconds=seconds)


def finetunejob(name: str = "bot", generation: int = 1, uid: str = "uid-1", **changes: Any) -> FineTuneJob:
    """Return a FineTuneJob as the API server stores it."""
    document = job_document(name, **changes)
    document["metadata"] |= {"namespace": "team-a", "uid": uid, "generation": generation}
    return parse_finetunejob(document)


def adaptermerge(name: str = "bot", generation: int = 1, uid: str = "uid-1", **changes: Any) -> AdapterMerge:
    """Return an AdapterMerge as the API server stores it."""
    document = merge_document(name, **changes)
    document["metadata"] |= {"namespace": "team-a", "uid": uid, "generation": generation}
    return parse_adaptermerge(document)


Build = Callable[..., Workload]
BOTH_KINDS = pytest.mark.parametrize("build", [finetunejob, adaptermerge])
"""For what must hold for either kind: `build` makes a workload."""


def job(attempt: int = 1, kind: Kind = FINETUNEJOB, **changes: Any) -> ObservedJob:
    """Return the Job of an attempt, created at `NOW`."""
    values = {
        "name": naming.job_name(kind, "bot", attempt),
        "uid": f"job-{attempt}",
        "owner_uid": "uid-1",
        "created": TIME,
    }
    return ObservedJob(**{**values, **changes})


def pod(attempt: int = 1, **changes: Any) -> ObservedPod:
    """Return a pod that waits, created at `NOW`."""
    values = {
        "name": f"bot-train-{attempt}-x",
        "uid": f"pod-{attempt}",
        "job_uid": f"job-{attempt}",
        "attempt": attempt,
        "phase": "Pending",
        "created": TIME,
    }
    return ObservedPod(**{**values, **changes})


def ended_pod(exit_code: int, attempt: int = 1, **changes: Any) -> ObservedPod:
    """Return a pod that ran for a minute."""
    values = {
        "phase": "Failed" if exit_code else "Succeeded",
        "exit_code": exit_code,
        "termination_reason": "Error" if exit_code else "Completed",
        "node": "node1",
        "started_at": TIME,
        "ended_at": "2026-01-01T12:01:00Z",
        "report": json.dumps(REPORT) if exit_code == 0 else None,
    }
    return pod(attempt, **{**values, **changes})


def failed(exit_code: int, attempt: int = 1, **changes: Any) -> ObservedRun:
    """Return a run whose attempt has failed."""
    return ObservedRun(job=job(attempt, finished="Failed"), pod=ended_pod(exit_code, attempt, **changes))


def succeeded(attempt: int = 1) -> ObservedRun:
    """Return a run whose attempt has succeeded."""
    return ObservedRun(job=job(attempt, finished="Complete"), pod=ended_pod(0, attempt))


def created(build: Build = finetunejob, **changes: Any) -> RunStatus:
    """Return the status right after the Job of the first attempt was created."""
    kind = kind_of(build())
    status = decide(build(), kind.status(), ObservedRun(job=job(kind=kind)), NOW, SETTINGS).status
    assert status.job_ref == JobRef(name=naming.job_name(kind, "bot", 1), uid="job-1")
    return status.model_copy(update=changes)
