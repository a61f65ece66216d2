"""What of a status depends on the kind of workload: the resolved settings, and what a report adds at the end. Pure."""

from __future__ import annotations

from typing import Any

from tunewright_api.defaults import resolve_evaluation, resolve_hyperparameters, resolve_lora
from tunewright_api.run_report import MergePlan, RunReport
from tunewright_api.v1alpha1.adaptermerge import AdapterMergeSpec
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec
from tunewright_api.v1alpha1.status import AdapterMergeStatus, FineTuneJobStatus, Plan, RunStatus
from tunewright_operator.kinds import Spec
from tunewright_operator.needs import needs_of
from tunewright_operator.settings import Settings


def first_plan(spec: Spec) -> Plan | MergePlan:
    """Return what is known of a run before its first pod: settings, with defaults filled in."""
    match spec:
        case FineTuneJobSpec():
            lora = resolve_lora(spec)
            return Plan(
                hyperparameters=resolve_hyperparameters(spec).document(),
                evaluation=resolve_evaluation(spec).strategy,
                lora=lora.document() if lora else None,
            )
        case AdapterMergeSpec():
            return MergePlan(
                base_uri=spec.base.uri if spec.base else None, dtype=None if spec.dtype == "Auto" else spec.dtype
            )


def results(status: RunStatus, report: RunReport) -> dict[str, Any]:
    """Return the fields of a status that the report of a published result sets, besides those of either kind."""
    if isinstance(status, AdapterMergeStatus):
        return {"plan": report.merge or status.plan, "verification": report.verification}
    assert isinstance(status, FineTuneJobStatus)
    found = report.plan.model_dump(exclude_none=True) if report.plan else {}
    return {"plan": (status.plan or Plan()).model_copy(update=found), "evaluation": report.evaluation}


def over_memory(spec: Spec, settings: Settings) -> str:
    """Return what to say of a pod that went over its memory limit."""
    text = f"the container went over its memory limit of {needs_of(spec, settings).memory} and was killed: "
    if isinstance(spec, FineTuneJobSpec):
        return f"{text}raise resources.memory, or lower hyperparameters.batchSize or maxSequenceLength"
    return f"{text}raise resources.memory"


def micro_batch(status: RunStatus, halvings: int) -> int | None:
    """Return the micro-batch of an attempt; None where nothing is trained. `status.plan` has that of the first one."""
    if not isinstance(status, FineTuneJobStatus):
        return None
    first = int(status.plan.hyperparameters["batchSize"]) if status.plan else 1
    return max(1, first >> halvings)
