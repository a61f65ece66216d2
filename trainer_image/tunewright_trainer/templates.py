"""Plain text made of columns, and plain text taken apart: for models that are no chat models. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.fields import BadField, listed, string

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.-]*)\}")


def check_prompt_template(template: str, first: Mapping[str, Any], place: str) -> None:
    """Check that every column that a prompt template names is there.

    Raises:
        InvalidConfiguration: One is not, or the template names none.
    """
    names = _PLACEHOLDER.findall(template)
    if not names:
        raise InvalidConfiguration(
            f"dataset.promptTemplate names no column: write one in braces, such as {{{next(iter(first), 'prompt')}}}"
        )
    missing = [name for name in names if name not in first]
    if missing:
        raise InvalidConfiguration(
            f"dataset.promptTemplate: {place} has no column {missing[0]!r}; the columns are {listed(first)}"
        )


def fill_prompt(template: str, values: Mapping[str, Any]) -> str:
    """Return the template with the row's columns in their places; a missing or empty one leaves nothing.

    Raises:
        BadField: A column is no text.
    """

    def column(match: re.Match[str]) -> str:
        name = match[1]
        return "" if values.get(name) is None else string(values, name, empty_is_fine=True)

    return _PLACEHOLDER.sub(column, template)


def split_at_response(text: str, template: str, column: str) -> dict[str, str]:
    """Split a text behind the last place where the response template stands.

    Raises:
        BadField: It does not stand there, or nothing follows.
    """
    before, found, answer = text.rpartition(template)
    if not found:
        raise BadField(column, f"does not hold dataset.responseTemplate {template!r}, so its answer is not known")
    if not answer.strip():
        raise BadField(column, f"has nothing after dataset.responseTemplate {template!r}")
    return {"prompt": before + template, "completion": answer}
