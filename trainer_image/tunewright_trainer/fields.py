"""Fields of rows, checked one by one; what is wrong is said with the field's name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunewright_trainer.data_files import kind_of

Names = Mapping[str, str]
"""Name of a format's field -> name of the column in the data."""

ROLES = {"system", "user", "assistant", "tool"}


class BadField(Exception):
    """A field of one row is unusable; the reader of the file adds the place."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def chat(
    values: Mapping[str, Any], column: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the turns of a chat with the roles that chat templates know.

    Raises:
        BadField: A turn does not fit.
    """
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
        if role_key not in turn:
            raise BadField(f"{place}.{role_key}", f"is missing; the turn has {listed(turn)}")
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise BadField(f"{place}.{role_key}", f"unknown role {role!r}: known are {listed(sorted(roles))}")
        messages.append(_turn(turn, roles[role], text_key, place))
    return messages


def _turn(turn: Mapping[str, Any], role: str, text_key: str, place: str) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    if not calls:
        message: dict[str, Any] = {
            "role": role,
            "content": string(turn, text_key, f"{place}.", empty_is_fine=role == "system"),
        }
    elif role != "assistant":
        raise BadField(f"{place}.tool_calls", f"only an assistant calls tools, this turn is the {role}'s")
    else:
        content = turn.get(text_key)
        if content is not None and not isinstance(content, str):
            raise BadField(f"{place}.{text_key}", f"must be a string, is {kind_of(content)}")
        message = {"role": role, "content": content or "", "tool_calls": _tool_calls(calls, f"{place}.tool_calls")}
    if role == "tool" and isinstance(turn.get("name"), str):
        message["name"] = turn["name"]
    return message


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return calls in the form that chat templates read; arguments as an object, which data often has as JSON text."""
    if not isinstance(calls, list):
        raise BadField(place, f"must be a list of calls, is {kind_of(calls)}")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadField(f"{place}[{index}]", "must be an object with function: {name, arguments}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise BadField(f"{place}[{index}].function.arguments", "is no JSON") from None
        if not isinstance(arguments, dict):
            raise BadField(f"{place}[{index}].function.arguments", f"must be an object, is {kind_of(arguments)}")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Return the tool schemas of a row; data often has them as JSON text.

    Raises:
        BadField: They are something else.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadField(column, "is no JSON") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadField(column, f"must be a list of tool schemas, is {kind_of(value)}")
    return value or None


def string(values: Mapping[str, Any], name: str, prefix: str = "", empty_is_fine: bool = False) -> str:
    """Return a text that is not empty.

    Raises:
        BadField: It is something else.
    """
    if name not in values:
        raise BadField(prefix + name, f"is missing; there are {listed(values)}")
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


def listed(names: Any) -> str:
    """Return names in quotes, the first twenty of them."""
    shown = [repr(str(name)[:64]) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") or "none"
