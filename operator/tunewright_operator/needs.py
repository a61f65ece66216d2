"""What a workload asks of the cluster, the platform's defaults filled in. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright_api.v1alpha1.adaptermerge import AdapterMergeSpec, MergeResources
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec, Resources
from tunewright_operator.kinds import Spec
from tunewright_operator.settings import Settings


@dataclass(frozen=True, slots=True)
class Needs:
    """What each pod of an attempt gets."""

    cpu: str
    memory: str
    ephemeral_storage: str
    shared_memory: str | None
    """Size of /dev/shm; None: what the container runtime gives."""
    gpus: int
    gpu_resource: str | None


def needs_of(spec: Spec, settings: Settings) -> Needs:
    """Return what a pod asks for. A merge needs no GPU, and no memory that processes share."""
    match spec:
        case FineTuneJobSpec():
            given = spec.resources or Resources()
            return Needs(
                cpu=given.cpu or settings.default_cpu,
                memory=given.memory or settings.default_memory,
                ephemeral_storage=given.ephemeral_storage or settings.default_ephemeral_storage,
                shared_memory=given.shared_memory or settings.default_shared_memory,
                gpus=given.gpus,
                gpu_resource=given.gpu_resource,
            )
        case AdapterMergeSpec():
            asked = spec.resources or MergeResources()
            return Needs(
                cpu=asked.cpu or settings.default_merge_cpu,
                memory=asked.memory or settings.default_merge_memory,
                ephemeral_storage=asked.ephemeral_storage or settings.default_merge_ephemeral_storage,
                shared_memory=None,
                gpus=0,
                gpu_resource=None,
            )


def nodes_of(spec: Spec) -> int:
    """Return the number of pods that work together."""
    return (spec.resources or Resources()).nodes if isinstance(spec, FineTuneJobSpec) else 1


def gpus_of(spec: Spec) -> int:
    """Return the number of GPUs of each pod."""
    return (spec.resources or Resources()).gpus if isinstance(spec, FineTuneJobSpec) else 0
