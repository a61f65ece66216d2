"""From spec, previous status and what the cluster shows to actions and the new status. Pure."""

from __future__ import annotations

from tunewright_operator.status.decide import decide, refuse_spec
from tunewright_operator.status.decision import Action, CreateJob, Decision, DeleteJobs
from tunewright_operator.status.events import TransitionEvent, transition_events
from tunewright_operator.status.memory import current_attempt, is_finished
from tunewright_operator.status.references import resolved

__all__ = [
    "Action",
    "CreateJob",
    "Decision",
    "DeleteJobs",
    "TransitionEvent",
    "current_attempt",
    "decide",
    "is_finished",
    "refuse_spec",
    "resolved",
    "transition_events",
]
