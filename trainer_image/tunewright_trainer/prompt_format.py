"""Rows that only ask: the model answers them by itself, and rewards judge the answers. Pure functions of one row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tunewright_trainer.data_files import kind_of
from tunewright_trainer.fields import ROLES, BadField, Names, chat, listed, string


def prompts(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Return the prompt, text or turns, and every further column for the rewards.

    The further columns are JSON in a string: they may differ from row to row, a table's columns may not.

    Raises:
        BadField: The prompt does not fit.
    """
    column = names["prompt"]
    prompt: str | list[dict[str, str]]
    if isinstance(values[column], list):
        prompt = chat(values, column, "role", "content", {role: role for role in ROLES})
        if prompt[-1]["role"] not in ("user", "tool"):
            raise BadField(column, f"ends with a turn of the {prompt[-1]['role']}, so there is nothing to answer")
    else:
        prompt = string(values, column)
    further = {name: value for name, value in values.items() if name != column}
    return {"prompt": prompt, "columns": json.dumps(further, default=str)}


def check_columns(values: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Check the columns that rewards compare answers with.

    Raises:
        BadField: One is missing, or is neither text nor a number.
    """
    for column in columns:
        if column not in values:
            raise BadField(
                column,
                f"is missing, but a reward of type ExactMatch reads it (exactMatch.column); the row has "
                f"{listed(values)}",
            )
        value = values[column]
        if not isinstance(value, str | int | float):
            raise BadField(column, f"must be text or a number to be compared with answers, is {kind_of(value)}")
        if isinstance(value, str):
            string(values, column)
