"""pydantic gives the verdict of the case table, which the API server is held to as well."""

from __future__ import annotations

import re

import pytest

from tests.rule_cases import BEFORE, CASES, MERGE_BEFORE, RULES, UNKNOWN_FIELDS, UPDATES, Case, all_rules
from tunewright_api.v1alpha1.adaptermerge import AdapterMergeSpec
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec
from tunewright_api.validation import InvalidDocument, parse_adaptermerge, parse_finetunejob


def parse(case: Case) -> None:
    """Parse the document of a case."""
    (parse_finetunejob if case.kind == "FineTuneJob" else parse_adaptermerge)(case.document())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(case: Case) -> None:
    """A valid document parses; a refusal says which rule or field is meant."""
    if case.accepted:
        parse(case)
        return
    with pytest.raises(InvalidDocument, match=re.escape(case.part)):
        parse(case)


@pytest.mark.parametrize(("case", "field", "meant"), UNKNOWN_FIELDS, ids=[field for _, field, _ in UNKNOWN_FIELDS])
def test_unknown_field(case: Case, field: str, meant: str | None) -> None:
    """A misspelt field is refused with the nearest name."""
    with pytest.raises(InvalidDocument, match=f"unknown field '{field}'" + (f".*'{meant}'" if meant else "")):
        parse(case)


def test_every_rule_has_both_cases() -> None:
    """No rule without a document that it lets pass and one that it refuses."""
    for rule in all_rules():
        verdicts = {case.accepted for case in RULES if case.part and rule.message.startswith(case.part)}
        assert verdicts == {True, False}, rule.message


@pytest.mark.parametrize(("spec", "before"), [(FineTuneJobSpec, BEFORE), (AdapterMergeSpec, MERGE_BEFORE)])
def test_every_transition_rule_has_a_case(spec: type[FineTuneJobSpec] | type[AdapterMergeSpec], before: Case) -> None:
    """Every immutable field is changed, and kept, in a case; optional ones are removed as well."""
    updates = [update for update in UPDATES if update.before == before]
    for rule in spec.transition_rules():
        assert any(update.part == rule["message"] for update in updates if not update.accepted), rule["message"]
        field = rule["message"].split()[0].removeprefix("spec.")
        assert any(update.accepted and field in update.patch for update in updates), field


@pytest.mark.parametrize("case", [BEFORE, MERGE_BEFORE], ids=lambda case: case.kind)
def test_the_document_that_updates_start_from_is_valid(case: Case) -> None:
    """Otherwise every update of it would be refused for another reason."""
    parse(case)
