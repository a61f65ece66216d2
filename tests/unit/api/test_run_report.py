"""Progress and report: bounded, strict, finite."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tunewright_api.run_report import MAX_REPORT_BYTES, Progress, RunPlan, RunReport

PLAN = RunPlan(target_modules=["m" * 128] * 64)


def test_a_short_report_is_written_whole() -> None:
    """Message and plan are both there."""
    report = RunReport(exit_code=20, reason="InvalidData", message="line 4,711", plan=RunPlan(total_steps=3))
    assert RunReport.model_validate_json(report.to_json()) == report


@settings(deadline=None)  # on a busy machine the first example takes longer
@given(st.text(max_size=1024), st.booleans())
def test_a_report_always_fits_the_termination_message(message: str, with_plan: bool) -> None:
    """Kubernetes would cut it in the middle otherwise, and the operator could not read it."""
    report = RunReport(exit_code=1, reason="InternalError", message=message, plan=PLAN if with_plan else None)
    text = report.to_json()
    assert len(text.encode()) <= MAX_REPORT_BYTES
    parsed = RunReport.model_validate_json(text)
    assert (parsed.exit_code, parsed.reason) == (1, "InternalError")


def test_the_message_outlives_the_plan() -> None:
    """Where both do not fit, what was wrong is worth more than what was planned."""
    report = RunReport(exit_code=20, reason="InvalidData", message="what to do", plan=PLAN)
    shortened = RunReport.model_validate_json(report.to_json())
    assert (shortened.plan, shortened.message) == (None, "what to do")


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(loss: float) -> None:
    """JSON has no NaN; a status with one would be refused by the API server."""
    with pytest.raises(ValidationError):
        Progress(stage="Training", loss=loss, updated_at="2026-01-01T00:00:00Z")


def test_an_image_of_the_user_s_own_cannot_smuggle_fields_in() -> None:
    """Progress comes over the network from a pod that is not trusted."""
    document = {"stage": "Training", "updatedAt": "2026-01-01T00:00:00Z", "script": "x"}
    with pytest.raises(ValidationError, match="script"):
        Progress.model_validate(document)


def test_the_loss_history_is_bounded() -> None:
    """It goes into the status, which etcd keeps."""
    history = [[step, 1.0] for step in range(65)]
    document = {"stage": "Training", "updatedAt": "t", "lossHistory": history}
    with pytest.raises(ValidationError, match="64"):
        Progress.model_validate_json(json.dumps(document))
