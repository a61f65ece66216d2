"""The Job of one attempt, and the run document in it."""

from __future__ import annotations

from typing import Any

from tunewright_api import API_VERSION
from tunewright_api.exit_codes import OUTCOMES, ExitCode
from tunewright_api.run_config import MAX_RUN_BYTES, TrainRun, build_train_run, resolve_storage
from tunewright_api.v1alpha1.finetunejob import KIND, FineTuneJob, FineTuneJobSpec
from tunewright_api.v1alpha1.pod import Pod
from tunewright_operator import constants, naming
from tunewright_operator.errors import RunTooLarge
from tunewright_operator.plan.pod import pod_spec
from tunewright_operator.settings import Settings

Manifest = dict[str, Any]


def plan_run(job: FineTuneJob, attempt: int, halvings: int, settings: Settings) -> TrainRun:
    """Return the run document of an attempt.

    Args:
        job: The FineTuneJob.
        attempt: Number of the attempt, from 1.
        halvings: How often the micro-batch is halved, with twice the accumulation each time, so that the
            optimizer sees the same batch: once per earlier attempt that ran out of GPU memory.
        settings: For the platform's storage and hub defaults.
    """
    assert job.metadata.namespace is not None, "the API server sets it"
    run = build_train_run(
        job.spec,
        name=job.metadata.name,
        namespace=job.metadata.namespace,
        attempt=attempt,
        storage=resolve_storage(job.spec, settings.storage),
        hub=settings.hub,
    )
    hyperparameters = run.hyperparameters
    smallest = 2 if run.objective.type == "KTO" else 1  # a rule has the reason
    for _ in range(halvings):
        if hyperparameters.batch_size // 2 < smallest:
            break
        hyperparameters = hyperparameters.model_copy(
            update={
                "batch_size": hyperparameters.batch_size // 2,
                "gradient_accumulation_steps": hyperparameters.gradient_accumulation_steps * 2,
            }
        )
    return run.model_copy(update={"hyperparameters": hyperparameters})


def build_job(job: FineTuneJob, attempt: int, halvings: int, settings: Settings) -> Manifest:
    """Return the Job of an attempt; arguments as for `plan_run`.

    Raises:
        RunTooLarge: The run document exceeds `MAX_RUN_BYTES`.
    """
    metadata = job.metadata
    labels = attempt_labels(metadata.name, attempt)
    pod = job.spec.pod or Pod()
    run = plan_run(job, attempt, halvings, settings)
    unique = pod_selector(job, attempt) if run.nodes > 1 else {}
    template_metadata: Manifest = {"labels": {**(pod.labels or {}), **labels, **unique}}
    if pod.annotations:
        template_metadata["annotations"] = dict(pod.annotations)
    size = len(run.to_json().encode())
    if size > MAX_RUN_BYTES:
        raise RunTooLarge(f"the run document has {size} bytes, {MAX_RUN_BYTES} are allowed: shorten model.chatTemplate")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": naming.job_name(metadata.name, attempt),
            "namespace": metadata.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(job)],
        },
        "spec": _job_spec(job.spec, template_metadata, run, settings),
    }


def _job_spec(spec: FineTuneJobSpec, template_metadata: Manifest, run: TrainRun, settings: Settings) -> Manifest:
    return {
        "completions": run.nodes,
        "parallelism": run.nodes,
        # Each pod has its number, and a host name that ends with it.
        **({"completionMode": "Indexed"} if run.nodes > 1 else {}),
        # A failed attempt is the operator's to judge; the next one is a new Job with a document of its own.
        "backoffLimit": 0,
        # No second pod before the first has really ended: they might share a volume.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": constants.CONTAINER_NAME,
                        "operator": "In",
                        "values": sorted(int(code) for code in OUTCOMES if code is not ExitCode.SUCCESS),
                    },
                },
            ]
        },
        "template": {"metadata": template_metadata, "spec": pod_spec(spec, run, settings)},
    }


def attempt_labels(name: str, attempt: int) -> dict[str, str]:
    """Return the labels of everything that belongs to an attempt."""
    return {
        constants.LABEL_MANAGED_BY: constants.OPERATOR_NAME,
        constants.LABEL_FINETUNEJOB: name,
        constants.LABEL_ATTEMPT: str(attempt),
        constants.LABEL_STAGE: constants.STAGE_TRAIN,
    }


def pod_selector(job: FineTuneJob, attempt: int) -> dict[str, str]:
    """Return labels that only the pods of one attempt of this FineTuneJob have."""
    assert job.metadata.uid is not None, "the API server sets it"
    return {constants.LABEL_UID: job.metadata.uid, constants.LABEL_ATTEMPT: str(attempt)}


def owner_reference(job: FineTuneJob) -> Manifest:
    """Return the reference by which what a FineTuneJob owns goes with it."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        # True would need permission to update our finalizers on some clusters, for nothing.
        "blockOwnerDeletion": False,
    }
