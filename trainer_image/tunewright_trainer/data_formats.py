"""The shapes rows may have, and what each becomes for training: pure functions of one row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunewright_api.v1alpha1.parts import Columns
from tunewright_trainer.data_files import kind_of
from tunewright_trainer.errors import InvalidConfiguration, InvalidData
from tunewright_trainer.protocol import RowFormat

Format = Literal["Text", "PromptCompletion", "Messages", "Alpaca", "ShareGPT"]
Names = Mapping[str, str]
"""Name of a format's field -> name of the column in the data."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The texts of the original Alpaca release, which models trained on such data expect."""

ROLES = {"system", "user", "assistant", "tool"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class BadField(Exception):
    """A field of one row is unusable; the reader of the file adds the place."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


@dataclass(frozen=True)
class _Shape:
    row_format: RowFormat
    required: tuple[str, ...]
    optional: tuple[str, ...]
    normalise: Callable[[Mapping[str, Any], Names], dict[str, Any]]


@dataclass(frozen=True)
class ChosenFormat:
    """A format, the columns it reads, and why it was chosen."""

    name: Format
    row_format: RowFormat
    names: Names
    why: str

    def normalise(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row as the worker reads it.

        Raises:
            BadField: The row does not fit the format.
        """
        shape = _SHAPES[self.name]
        for field in shape.required:
            if self.names[field] not in values:
                raise BadField(self.names[field], f"is missing; the row has {_listed(values)}")
        return shape.normalise(values, self.names)


def choose_format(wanted: str, columns: Columns | None, first: Mapping[str, Any], place: str) -> ChosenFormat:
    """Settle the format of a data set by its first row.

    Args:
        wanted: dataset.format.
        columns: dataset.columns.
        first: The first row.
        place: Where it stands, for messages.

    Raises:
        InvalidConfiguration: A rename is for a field that the format does not have.
        InvalidData: The row has not the columns that the format needs, or Auto recognises none.
    """
    renames = {} if columns is None else columns.model_dump(exclude_none=True)
    absent = {field: column for field, column in renames.items() if column not in first}
    if absent:
        field, column = next(iter(absent.items()))
        raise InvalidData(f"{place}: dataset.columns.{field}: {_no_column(column, first)}")
    if wanted == "Auto":
        return _detect(renames, first, place)
    name: Format = wanted  # type: ignore[assignment]  # the schema allows nothing else
    shape = _SHAPES[name]
    foreign = [field for field in renames if field not in shape.required + shape.optional]
    if foreign:
        raise InvalidConfiguration(
            f"dataset.columns.{foreign[0]} is not a field of format {name}, which has {_listed(shape.required)}"
        )
    names = _names(shape, renames, first)
    for field in shape.required:
        if names[field] not in first:
            raise InvalidData(f"{place}: format {name}: {_no_column(names[field], first)}; {_rename_hint(field)}")
    return ChosenFormat(name, shape.row_format, names, "set by dataset.format")


def _detect(renames: Names, first: Mapping[str, Any], place: str) -> ChosenFormat:
    for name, shape in _SHAPES.items():
        names = _names(shape, renames, first)
        fields = shape.required + shape.optional
        if not all(field in fields for field in renames) or not all(names[f] in first for f in shape.required):
            continue
        if name in ("Messages", "ShareGPT") and (name == "ShareGPT") != _looks_sharegpt(first[names["messages"]]):
            continue
        return ChosenFormat(name, shape.row_format, names, f"columns {_listed(names[f] for f in shape.required)}")
    known = "; ".join(f"{name} ({_listed(shape.required)})" for name, shape in _SHAPES.items())
    raise InvalidData(
        f"{place}: columns {_listed(first)} fit no format: {known}. Rename with dataset.columns, "
        "for example columns: {prompt: question, completion: answer}"
    )


def _names(shape: _Shape, renames: Names, first: Mapping[str, Any]) -> dict[str, str]:
    names = {field: renames.get(field, field) for field in shape.required + shape.optional}
    # Chats stand under either name in public data, whatever the names of their fields.
    if "messages" in names and "messages" not in renames and "messages" not in first and "conversations" in first:
        names["messages"] = "conversations"
    return names


def _looks_sharegpt(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _text(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {"text": _string(values, names["text"])}


def _prompt_completion(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {field: _string(values, names[field]) for field in ("prompt", "completion")}


def _alpaca(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    instruction = _string(values, names["instruction"])
    further = values.get(names["input"])
    if further is None or further == "":
        prompt = ALPACA_WITHOUT_INPUT.format(instruction=instruction)
    else:
        prompt = ALPACA_WITH_INPUT.format(instruction=instruction, input=_string(values, names["input"]))
    return {"prompt": prompt, "completion": _string(values, names["output"])}


def _messages(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return _chat(values, names["messages"], "role", "content", {role: role for role in ROLES})


def _sharegpt(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return _chat(values, names["messages"], "from", "value", SHAREGPT_ROLES)


def _chat(
    values: Mapping[str, Any], column: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> dict[str, Any]:
    turns = values[column]
    if not isinstance(turns, list):
        raise BadField(column, f"must be a list of turns, is {kind_of(turns)}")
    if not turns:
        raise BadField(column, "is an empty list")
    messages = []
    for index, turn in enumerate(turns):
        place = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise BadField(place, f"must be an object with {role_key!r} and {text_key!r}, is {kind_of(turn)}")
        if turn.get("tool_calls"):
            raise BadField(f"{place}.tool_calls", "tool calls are not trained on: write them as text into the content")
        if role_key not in turn:
            raise BadField(f"{place}.{role_key}", f"is missing; the turn has {_listed(turn)}")
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise BadField(f"{place}.{role_key}", f"unknown role {role!r}: known are {_listed(sorted(roles))}")
        empty_is_fine = roles[role] == "system"
        messages.append({"role": roles[role], "content": _string(turn, text_key, f"{place}.", empty_is_fine)})
    if all(message["role"] != "assistant" for message in messages):
        raise BadField(column, "has no assistant turn, so there is nothing to learn from")
    return {"messages": messages}


def _string(values: Mapping[str, Any], name: str, prefix: str = "", empty_is_fine: bool = False) -> str:
    if name not in values:
        raise BadField(prefix + name, f"is missing; there are {_listed(values)}")
    value = values[name]
    if not isinstance(value, str):
        hint = "; chats have format Messages" if isinstance(value, list) and not prefix else ""
        raise BadField(prefix + name, f"must be a string, is {kind_of(value)}{hint}")
    if not value.strip() and not empty_is_fine:
        raise BadField(prefix + name, "is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadField(prefix + name, "holds half of a surrogate pair, which is no character") from None
    return value


def _no_column(column: str, values: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(column, [str(name) for name in values], n=1, cutoff=0.5)
    nearest = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no column {column!r}: {nearest}The columns are {_listed(values)}"


def _rename_hint(field: str) -> str:
    return f"rename with dataset.columns.{field}, or choose another dataset.format"


def _listed(names: Any) -> str:
    shown = [repr(str(name)[:64]) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") or "none"


_SHAPES: dict[Format, _Shape] = {
    "Messages": _Shape("Messages", ("messages",), (), _messages),
    "ShareGPT": _Shape("Messages", ("messages",), (), _sharegpt),
    "PromptCompletion": _Shape("PromptCompletion", ("prompt", "completion"), (), _prompt_completion),
    "Alpaca": _Shape("PromptCompletion", ("instruction", "output"), ("input",), _alpaca),
    "Text": _Shape("Text", ("text",), (), _text),
}
"""In the order in which Auto tries them: a row with chat turns and a text rendering of them is a chat."""
