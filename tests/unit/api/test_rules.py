"""pydantic gives the verdict of the case table, which the API server is held to as well."""

from __future__ import annotations

import re

import pytest

from tests.rule_cases import BEFORE, CASES, RULES, UNKNOWN_FIELDS, UPDATES, Case, all_rules
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec
from tunewright_api.validation import InvalidDocument, parse_finetunejob


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(case: Case) -> None:
    """A valid document parses; a refusal says which rule or field is meant."""
    if case.accepted:
        parse_finetunejob(case.document())
        return
    with pytest.raises(InvalidDocument, match=re.escape(case.part)):
        parse_finetunejob(case.document())


@pytest.mark.parametrize(("changes", "field", "meant"), UNKNOWN_FIELDS, ids=lambda value: str(value))
def test_unknown_field(changes: dict[str, object], field: str, meant: str | None) -> None:
    """A misspelt field is refused with the nearest name."""
    with pytest.raises(InvalidDocument, match=f"unknown field '{field}'" + (f".*'{meant}'" if meant else "")):
        parse_finetunejob(Case("x", False, changes).document())


def test_every_rule_has_both_cases() -> None:
    """No rule without a document that it lets pass and one that it refuses."""
    for rule in all_rules():
        verdicts = {case.accepted for case in RULES if case.part and rule.message.startswith(case.part)}
        assert verdicts == {True, False}, rule.message


def test_every_transition_rule_has_a_case() -> None:
    """Every immutable field is changed, and kept, in a case; optional ones are removed as well."""
    for rule in FineTuneJobSpec.transition_rules():
        assert any(update.part == rule["message"] for update in UPDATES if not update.accepted), rule["message"]
        field = rule["message"].split()[0].removeprefix("spec.")
        assert any(update.accepted and field in update.patch for update in UPDATES), field


def test_the_document_that_updates_start_from_is_valid() -> None:
    """Otherwise every update of it would be refused for another reason."""
    parse_finetunejob(BEFORE.document())
