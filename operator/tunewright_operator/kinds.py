"""The two kinds of workloads: all that tells the one from the other before its spec is parsed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tunewright_api.v1alpha1 import adaptermerge, finetunejob
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge, AdapterMergeSpec
from tunewright_api.v1alpha1.finetunejob import FineTuneJob, FineTuneJobSpec
from tunewright_api.v1alpha1.status import AdapterMergeStatus, FineTuneJobStatus
from tunewright_api.validation import parse_adaptermerge, parse_finetunejob
from tunewright_operator import constants

Workload = FineTuneJob | AdapterMerge
Spec = FineTuneJobSpec | AdapterMergeSpec


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A kind of workloads. There are two, and each is equal to itself alone."""

    name: str
    plural: str
    """Name in paths of the API server."""
    label: str
    """On Jobs and pods: name of the workload."""
    stage: str
    """What its Jobs do; part of their names."""
    parse: Callable[[Mapping[str, Any]], Workload]
    """Raises `InvalidDocument`."""
    status: type[FineTuneJobStatus] | type[AdapterMergeStatus]


FINETUNEJOB = Kind(
    finetunejob.KIND,
    finetunejob.PLURAL,
    constants.LABEL_FINETUNEJOB,
    constants.STAGE_TRAIN,
    parse_finetunejob,
    FineTuneJobStatus,
)
ADAPTERMERGE = Kind(
    adaptermerge.KIND,
    adaptermerge.PLURAL,
    constants.LABEL_ADAPTERMERGE,
    constants.STAGE_MERGE,
    parse_adaptermerge,
    AdapterMergeStatus,
)
KINDS = (FINETUNEJOB, ADAPTERMERGE)


def kind_of(workload: Workload) -> Kind:
    """Return the kind of a parsed workload."""
    return FINETUNEJOB if isinstance(workload, FineTuneJob) else ADAPTERMERGE


class Key(NamedTuple):
    """A workload: two of one name but different kinds are two."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        """Return the key as people write it."""
        return f"{self.namespace}/{self.short}"

    @property
    def short(self) -> str:
        """The key within its namespace, as kubectl takes it: `finetunejob/support-bot`."""
        return f"{self.kind.name.lower()}/{self.name}"

    @property
    def log_field(self) -> dict[str, str]:
        """The key as a field of a log line."""
        return {self.kind.name.lower(): f"{self.namespace}/{self.name}"}
