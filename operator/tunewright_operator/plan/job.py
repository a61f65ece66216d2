"""The Job of one attempt, and the run document in it."""

from __future__ import annotations

from typing import Any

from tunewright_api import API_VERSION
from tunewright_api.exit_codes import OUTCOMES, ExitCode
from tunewright_api.merge_run import MergeRun, build_merge_run
from tunewright_api.run_config import MAX_RUN_BYTES, TrainRun, build_train_run, resolve_storage
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge
from tunewright_api.v1alpha1.finetunejob import FineTuneJob
from tunewright_api.v1alpha1.pod import Pod
from tunewright_operator import constants, naming
from tunewright_operator.errors import RunTooLarge
from tunewright_operator.kinds import Kind, Workload, kind_of
from tunewright_operator.needs import nodes_of
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


def plan_merge(merge: AdapterMerge, attempt: int, settings: Settings) -> MergeRun:
    """Return the run document of an attempt; arguments as for `plan_run`."""
    assert merge.metadata.namespace is not None, "the API server sets it"
    return build_merge_run(
        merge.spec,
        name=merge.metadata.name,
        namespace=merge.metadata.namespace,
        attempt=attempt,
        storage=resolve_storage(merge.spec, settings.storage),
        hub=settings.hub,
    )


def build_job(workload: Workload, attempt: int, halvings: int, settings: Settings) -> Manifest:
    """Return the Job of an attempt; arguments as for `plan_run`.

    Raises:
        RunTooLarge: The run document exceeds `MAX_RUN_BYTES`.
    """
    match workload:
        case FineTuneJob():
            run: TrainRun | MergeRun = plan_run(workload, attempt, halvings, settings)
            remedy = "shorten model.chatTemplate"
        case AdapterMerge():
            run = plan_merge(workload, attempt, settings)
            remedy = "give fewer or shorter verification.prompts"
    size = len(run.to_json().encode())
    if size > MAX_RUN_BYTES:
        raise RunTooLarge(f"the run document has {size} bytes, {MAX_RUN_BYTES} are allowed: {remedy}")
    metadata, kind = workload.metadata, kind_of(workload)
    labels = attempt_labels(kind, metadata.name, attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": naming.job_name(kind, metadata.name, attempt),
            "namespace": metadata.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(workload)],
        },
        "spec": _job_spec(workload, labels, run, settings),
    }


def _job_spec(workload: Workload, labels: Manifest, run: TrainRun | MergeRun, settings: Settings) -> Manifest:
    nodes, pod = nodes_of(workload.spec), workload.spec.pod or Pod()
    unique = pod_selector(workload, run.attempt) if nodes > 1 else {}
    template_metadata: Manifest = {"labels": {**(pod.labels or {}), **labels, **unique}}
    if pod.annotations:
        template_metadata["annotations"] = dict(pod.annotations)
    return {
        "completions": nodes,
        "parallelism": nodes,
        # Each pod has its number, and a host name that ends with it.
        **({"completionMode": "Indexed"} if nodes > 1 else {}),
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
        "template": {"metadata": template_metadata, "spec": pod_spec(workload.spec, run, settings)},
    }


def attempt_labels(kind: Kind, name: str, attempt: int) -> dict[str, str]:
    """Return the labels of everything that belongs to an attempt."""
    return {
        constants.LABEL_MANAGED_BY: constants.OPERATOR_NAME,
        kind.label: name,
        constants.LABEL_ATTEMPT: str(attempt),
        constants.LABEL_STAGE: kind.stage,
    }


def pod_selector(workload: Workload, attempt: int) -> dict[str, str]:
    """Return labels that only the pods of one attempt of this workload have."""
    assert workload.metadata.uid is not None, "the API server sets it"
    return {constants.LABEL_UID: workload.metadata.uid, constants.LABEL_ATTEMPT: str(attempt)}


def owner_reference(workload: Workload) -> Manifest:
    """Return the reference by which what a workload owns goes with it."""
    return {
        "apiVersion": API_VERSION,
        "kind": workload.kind,
        "name": workload.metadata.name,
        "uid": workload.metadata.uid,
        "controller": True,
        # True would need permission to update our finalizers on some clusters, for nothing.
        "blockOwnerDeletion": False,
    }
