"""Cases of every validation rule: pydantic (`tests/unit/api/test_rules.py`) and the API server
(`tests/integration/test_crd.py`) must give the same verdict on each."""

from __future__ import annotations

from tests.rule_cases.blocks import BLOCK_RULES, EVALUATION_RULES, POD_RULES
from tests.rule_cases.case import Case
from tests.rule_cases.merges import MERGE_RULES, MERGE_SCHEMA, MERGE_UNKNOWN_FIELDS
from tests.rule_cases.methods import CONTINUE_RULES, METHOD_RULES
from tests.rule_cases.rewards import GRPO_RULES, PPO_RULES
from tests.rule_cases.schema import FINETUNEJOB_UNKNOWN_FIELDS, SCHEMA, URIS
from tests.rule_cases.sharding import SHARDING_RULES
from tests.rule_cases.updates import BEFORE, MERGE_BEFORE, UPDATES, Update
from tunewright_api.base import Rule, SpecModel

__all__ = ["BEFORE", "CASES", "MERGE_BEFORE", "RULES", "UNKNOWN_FIELDS", "UPDATES", "Case", "Update", "all_rules"]

RULES = (
    *GRPO_RULES,
    *PPO_RULES,
    *METHOD_RULES,
    *CONTINUE_RULES,
    *BLOCK_RULES,
    *EVALUATION_RULES,
    *POD_RULES,
    *MERGE_RULES,
    *SHARDING_RULES,
)
"""Rules written as CEL on the server and as predicates in Python; `part` is the start of the rule's message."""
CASES = (*RULES, *URIS, *SCHEMA, *MERGE_SCHEMA)
UNKNOWN_FIELDS = (
    *((Case("x", False, changes), field, meant) for changes, field, meant in FINETUNEJOB_UNKNOWN_FIELDS),
    *((Case("x", False, changes, kind="AdapterMerge"), field, meant) for changes, field, meant in MERGE_UNKNOWN_FIELDS),
)
"""Objects with a misspelt or forbidden field: the case, the field, and the name that is meant."""


def all_rules() -> list[Rule]:
    """Return every rule of the models."""
    found, line = [], [SpecModel]
    while line:
        model = line.pop()
        line.extend(model.__subclasses__())
        found.extend(model.__dict__.get("RULES", ()))
    return found
