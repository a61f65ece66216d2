"""What users, kubelet and Job controller write, as the benchmark plays them."""

from __future__ import annotations

import json
import time
from typing import Any

NAMESPACE = "bench"

REPORT = {
    "version": 1,
    "exitCode": 0,
    "reason": "Succeeded",
    "message": "",
    "stage": "Finished",
    "step": 10,
    "totalSteps": 10,
    "runKey": "0123456789abcdef",
    "loss": 1.5,
    "output": {
        "uri": "s3://models/bench/0123456789abcdef/01234567/adapter",
        "manifestUri": "s3://models/bench/0123456789abcdef/manifest.json",
        "digest": "sha256:" + "0" * 64,
        "sizeBytes": 1000,
    },
}


def finetunejob(name: str) -> dict[str, Any]:
    """Return a FineTuneJob as users write it."""
    return {
        "apiVersion": "tunewright.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
            "dataset": {"train": [{"uri": "s3://datasets/support/train.jsonl"}], "validationFraction": 0.1},
            "method": {"type": "LoRA"},
            "output": {"uri": f"s3://models/{name}"},
            "storage": {"secretName": "s3-credentials"},
        },
    }


def pod_status() -> dict[str, Any]:
    """Return what a kubelet says of a pod that has succeeded."""
    now = _now()
    ended = {"exitCode": 0, "reason": "Completed", "message": json.dumps(REPORT), "startedAt": now, "finishedAt": now}
    return {
        "phase": "Succeeded",
        "conditions": [{"type": "Ready", "status": "False", "reason": "PodCompleted", "lastTransitionTime": now}],
        "containerStatuses": [
            {
                "name": "trainer",
                "image": "x",
                "imageID": "x",
                "ready": False,
                "restartCount": 0,
                "state": {"terminated": ended},
            }
        ],
    }


def job_status() -> dict[str, Any]:
    """Return what the Job controller says of a Job that is complete."""
    now = _now()
    kinds = ("SuccessCriteriaMet", "Complete")
    conditions = [
        {"type": kind, "status": "True", "reason": "CompletionsReached", "lastTransitionTime": now} for kind in kinds
    ]
    return {
        "active": 0,
        "ready": 0,
        "succeeded": 1,
        "terminating": 0,
        "completionTime": now,
        "conditions": conditions,
        "uncountedTerminatedPods": {},
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
