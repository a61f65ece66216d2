"""Waiting for the results of other workloads. Pure."""

from __future__ import annotations

import datetime

from tunewright_api.conditions import ConditionType, Reason
from tunewright_api.references import with_merged_model, with_results
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec
from tunewright_api.v1alpha1.status import FineTuneJobStatus, ResolvedReference, RunStatus
from tunewright_operator.kinds import ADAPTERMERGE, Spec, Workload
from tunewright_operator.observed import ObservedReference
from tunewright_operator.status import ending
from tunewright_operator.status.decision import Decision
from tunewright_operator.status.memory import mark


def take_over(spec: Spec, status: RunStatus, seen: tuple[ObservedReference, ...]) -> RunStatus:
    """Return the status with the results that are there now; what a name stood for once, it stands for to the end."""
    found = [
        ResolvedReference(adapter_merge=other.name, manifest_uri=other.manifest_uri, uri=other.uri)
        if other.kind is ADAPTERMERGE
        else ResolvedReference(fine_tune_job=other.name, manifest_uri=other.manifest_uri)
        for other in seen
        if other.manifest_uri is not None
    ]
    if found:
        status = status.model_copy(update={"references": [*(status.references or ()), *found]})
    if isinstance(spec, FineTuneJobSpec) and isinstance(status, FineTuneJobStatus):
        return _with_start(spec, status)
    return status


def _with_start(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return the status with the adapter that training goes on from in its plan."""
    start = with_results(spec.model, _manifests(status)).continue_from
    if start is None or start.uri is None or status.plan is None or status.plan.continued_from is not None:
        return status
    return status.model_copy(update={"plan": status.plan.model_copy(update={"continued_from": start.uri})})


def wait(status: RunStatus, seen: tuple[ObservedReference, ...], now: datetime.datetime) -> Decision | None:
    """Return what follows from results that are not there; None when all are.

    Waiting asks nothing of the API server: events of the others bring us back.
    """
    missing = [other for other in seen if other.manifest_uri is None]
    for other in missing:
        if other.state in ("Failed", "Circular", "NoModel"):
            return Decision(ending.fail(status, Reason.DEPENDENCY_FAILED, _why(other), now))
    if not missing:
        return None
    message = f"waiting for the result of {', '.join(_what(other) for other in missing)}"
    merge = missing[0].kind is ADAPTERMERGE
    reason = Reason.WAITING_FOR_ADAPTERMERGE if merge else Reason.WAITING_FOR_FINETUNEJOB
    status = mark(status, now, (ConditionType.PODS_READY, False, reason, message))
    return Decision(status.model_copy(update={"phase": "Pending"}))


def resolved(workload: Workload, status: RunStatus) -> Workload:
    """Return the workload with the addresses of results in place of names."""
    spec: Spec = with_results(workload.spec, _manifests(status))
    merged = next((found.uri for found in status.references or () if found.uri is not None), None)
    if merged is not None and isinstance(spec, FineTuneJobSpec):
        spec = with_merged_model(spec, merged)
    return workload.model_copy(update={"spec": spec})


def _manifests(status: RunStatus) -> dict[str, str]:
    """Return the manifests of FineTuneJobs by name."""
    found = status.references or ()
    return {one.fine_tune_job: one.manifest_uri for one in found if one.fine_tune_job is not None}


def _what(other: ObservedReference) -> str:
    if other.state == "Missing":
        return f"{other.kind.name} {other.name}, which does not exist: create it in this namespace"
    return f"{other.kind.name} {other.name} ({other.detail})"


def _why(other: ObservedReference) -> str:
    if other.state == "Circular":
        return (
            f"these wait for one another, and none can start: {other.detail}. "
            "Create one of them under another name, with a result that is there"
        )
    if other.state == "NoModel":
        return (
            f"{other.kind.name} {other.name} publishes an adapter (output.adapterOnly), and model.fromMerge needs a "
            "model: name one without adapterOnly, or go on from the adapter with model.continueFrom"
        )
    return (
        f"{other.kind.name} {other.name}, whose result this one needs, has failed: {other.detail}. Create both again "
        "under other names once that is corrected"
    )
