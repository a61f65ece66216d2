"""Check a FineTuneJob or AdapterMerge document and say all that is wrong with it at once."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from tunewright_api.v1alpha1.adaptermerge import AdapterMerge
from tunewright_api.v1alpha1.finetunejob import FineTuneJob

Kind = TypeVar("Kind", FineTuneJob, AdapterMerge)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, and what to do."""

    path: str
    message: str

    def __str__(self) -> str:
        """Return the problem as one line."""
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidDocument(ValueError):
    """A document breaks the schema or a rule; carries every problem found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(p) for p in problems))


def parse_finetunejob(document: Mapping[str, Any], *, local: bool = False) -> FineTuneJob:
    """Parse a FineTuneJob as the API server would; arguments and errors as for `parse_adaptermerge`."""
    return _parse(FineTuneJob, document, local)


def parse_adaptermerge(document: Mapping[str, Any], *, local: bool = False) -> AdapterMerge:
    """Parse an AdapterMerge as the API server would.

    Args:
        document: The YAML or JSON document.
        local: Accept local paths where URIs stand (local runs only).

    Raises:
        InvalidDocument: With all problems at once, misspelt fields with the nearest name.
    """
    return _parse(AdapterMerge, document, local)


def _parse(kind: type[Kind], document: Mapping[str, Any], local: bool) -> Kind:
    try:
        # by_name=False: Python's own field names (learning_rate) are no spelling of the API.
        return kind.model_validate(document, context={"local": local}, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidDocument([_problem(kind, e) for e in error.errors()]) from None


def _problem(kind: type[BaseModel], error: ErrorDetails) -> Problem:
    location = error["loc"]
    path = _path(location)
    if error["type"] == "extra_forbidden":
        return Problem(path, _unknown_field(kind, location))
    if error["type"] == "missing":
        return Problem(path, "required, but missing")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("float_type", "int_type") and isinstance(error["input"], str):
        message += f" (a string, {error['input']!r}, stands there: remove the quotes)"
    return Problem(path, message)


def _path(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        if part == "[key]":
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _unknown_field(kind: type[BaseModel], location: Sequence[str | int]) -> str:
    name = str(location[-1])
    model = _model_at(kind, location[:-1])
    known = [field.alias or to_camel(key) for key, field in model.model_fields.items()] if model else []
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if nearest:
        return f"unknown field {name!r}: did you mean {nearest[0]!r}?"
    return f"unknown field {name!r}: known here are {', '.join(sorted(known))}"


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the model class that stands at a location inside `model`."""
    for part in location:
        if isinstance(part, int):
            continue
        field = next((f for key, f in model.model_fields.items() if part in (f.alias, to_camel(key))), None)
        inner = _inner_model(field.annotation) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return next((m for a in typing.get_args(annotation) if (m := _inner_model(a))), None)
    return None
