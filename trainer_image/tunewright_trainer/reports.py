"""The reports that a run ends with. Pure functions."""

from __future__ import annotations

from tunewright_api.conditions import Reason
from tunewright_api.exit_codes import ExitCode
from tunewright_api.run_config import TrainRun
from tunewright_api.run_report import EvaluationResult, MergePlan, MergeVerification, Progress, RunReport
from tunewright_trainer.documents import Finished, metrics
from tunewright_trainer.errors import TrainerError, fate_of
from tunewright_trainer.publish import Published
from tunewright_trainer.tracker import finite

MAX_MESSAGE_CHARACTERS = 1024


def failed(error: TrainerError, progress: Progress, run_key: str | None, message: str) -> RunReport:
    """Return the report of a run that ended by `error`; `message` is its text without secrets."""
    code, reason = fate_of(error)
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[: MAX_MESSAGE_CHARACTERS - 3] + "..."
    return RunReport(
        exit_code=code,
        reason=reason[:64],
        message=message,
        stage=progress.stage,
        step=progress.step,
        total_steps=progress.total_steps,
        run_key=run_key,
        loss=progress.loss,
    )


def succeeded(finished: Finished, published: Published, early_stop: str | None) -> RunReport:
    """Return the report of a run that was trained and published; `early_stop` says why it ended early."""
    result = finished.result
    return RunReport(
        exit_code=ExitCode.SUCCESS,
        reason="Succeeded" if early_stop is None else Reason.EARLY_STOPPED,
        message=early_stop or "",
        stage="Finished",
        step=result.steps,
        total_steps=finished.plan.total_steps,
        run_key=finished.run_key,
        loss=metrics(finished).get("loss"),
        plan=finished.plan,
        evaluation=finished.evaluation,
        output=published.output,
        train_seconds=finite(result.train_seconds),
    )


def took_part(run: TrainRun, node_rank: int, run_key: str | None) -> RunReport:
    """Return the report of a pod that trained along, or would have: the first pod's report has the result."""
    return RunReport(
        exit_code=ExitCode.SUCCESS,
        reason="TookPart",
        message=f"pod {node_rank} of {run.nodes} (counted from 0) did its part; pod 0 reports the result",
        stage="Finished",
        run_key=run_key,
    )


def cached(published: Published) -> RunReport:
    """Return the report of a run whose result was there already."""
    numbers = published.manifest.metrics
    evaluation, merge = numbers.get("evaluation"), numbers.get("merge")
    verification = published.manifest.verification
    return RunReport(
        exit_code=ExitCode.SUCCESS,
        reason="Cached",
        message="the same run was published before; nothing was done again",
        stage="Finished",
        run_key=published.manifest.run_key,
        cached=True,
        step=numbers.get("steps", 0),
        total_steps=numbers.get("steps"),
        loss=numbers.get("loss"),
        evaluation=EvaluationResult.model_validate(evaluation) if evaluation else None,
        output=published.output,
        train_seconds=numbers.get("trainSeconds"),
        merge=MergePlan.model_validate(merge) if merge else None,
        verification=MergeVerification.model_validate(verification) if verification else None,
    )


def merged(run_key: str, plan: MergePlan, verification: MergeVerification, published: Published) -> RunReport:
    """Return the report of adapters that were merged (or combined) and published."""
    return RunReport(
        exit_code=ExitCode.SUCCESS,
        reason="Succeeded",
        stage="Finished",
        run_key=run_key,
        output=published.output,
        merge=plan,
        verification=verification,
    )
