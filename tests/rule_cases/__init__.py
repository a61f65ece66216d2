"""Cases of every validation rule: pydantic (`tests/unit/api/test_rules.py`) and the API server
(`tests/integration/test_crd.py`) must give the same verdict on each."""

from __future__ import annotations

from tests.rule_cases.blocks import BLOCK_RULES, EVALUATION_RULES, POD_RULES
from tests.rule_cases.case import Case
from tests.rule_cases.methods import CONTINUE_RULES, METHOD_RULES
from tests.rule_cases.rewards import GRPO_RULES, PPO_RULES
from tests.rule_cases.schema import SCHEMA, UNKNOWN_FIELDS, URIS
from tests.rule_cases.sharding import SHARDING_RULES
from tests.rule_cases.updates import BEFORE, UPDATES, Update
from tunewright_api.base import Rule, SpecModel

__all__ = ["BEFORE", "CASES", "RULES", "UNKNOWN_FIELDS", "UPDATES", "Case", "Update", "all_rules"]

RULES = (
    *GRPO_RULES,
    *PPO_RULES,
    *METHOD_RULES,
    *CONTINUE_RULES,
    *BLOCK_RULES,
    *EVALUATION_RULES,
    *POD_RULES,
    *SHARDING_RULES,
)
"""Rules written as CEL on the server and as predicates in Python; `part` is the start of the rule's message."""
CASES = (*RULES, *URIS, *SCHEMA)


def all_rules() -> list[Rule]:
    """Return every rule of the models."""
    found, line = [], [SpecModel]
    while line:
        model = line.pop()
        line.extend(model.__subclasses__())
        found.extend(model.__dict__.get("RULES", ()))
    return found
