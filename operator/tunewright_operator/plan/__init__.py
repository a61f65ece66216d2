"""From a FineTuneJob to its Job. Pure."""

from __future__ import annotations

from tunewright_operator.plan.job import build_job, plan_run

__all__ = ["build_job", "plan_run"]
