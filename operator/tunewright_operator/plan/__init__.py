"""From a FineTuneJob or AdapterMerge to its Job, and to the Service of several pods. Pure."""

from __future__ import annotations

from tunewright_operator.plan.job import build_job, plan_merge, plan_run
from tunewright_operator.plan.service import build_service

__all__ = ["build_job", "build_service", "plan_merge", "plan_run"]
