"""Conditions: setting and finding them."""

from __future__ import annotations

from typing import Literal

import pytest

from tunewright_api.conditions import Condition, ConditionType, find_condition, is_true, set_condition


def condition(kind: str, status: Literal["True", "False", "Unknown"], time: str, message: str = "") -> Condition:
    """Return a condition with the fields that matter here."""
    return Condition(type=kind, status=status, reason="Pending", message=message, last_transition_time=time)


def test_a_new_type_is_appended() -> None:
    """The order in which conditions appeared is kept."""
    result = set_condition([condition("Ready", "False", "t1")], condition("Complete", "False", "t2"))
    assert [c.type for c in result] == ["Ready", "Complete"]


def test_a_changed_message_is_no_transition() -> None:
    """lastTransitionTime stays while the status does, and the rest is taken over."""
    (result,) = set_condition([condition("Ready", "False", "t1")], condition("Ready", "False", "t2", "new"))
    assert (result.last_transition_time, result.message) == ("t1", "new")


def test_a_changed_status_is_a_transition() -> None:
    """lastTransitionTime moves with the status."""
    (result,) = set_condition([condition("Ready", "False", "t1")], condition("Ready", "True", "t2"))
    assert (result.last_transition_time, result.status) == ("t2", "True")


def test_the_given_conditions_are_left_alone() -> None:
    """The function is pure: the caller may compare before and after."""
    before = [condition("Ready", "False", "t1")]
    set_condition(before, condition("Ready", "True", "t2"))
    assert before == [condition("Ready", "False", "t1")]


@pytest.mark.parametrize(("status", "expected"), [("True", True), ("False", False), ("Unknown", False)])
def test_only_true_is_true(status: Literal["True", "False", "Unknown"], expected: bool) -> None:
    """Unknown counts as not true."""
    assert is_true([condition("Complete", status, "t1")], ConditionType.COMPLETE) is expected


def test_an_absent_condition_is_not_true() -> None:
    """Before the first visit there are no conditions."""
    assert find_condition([], ConditionType.COMPLETE) is None
    assert not is_true([], ConditionType.COMPLETE)
