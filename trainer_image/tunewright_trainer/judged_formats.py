"""Rows that say which answer is better, or which label is right: pure functions of one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunewright_trainer.data_files import kind_of
from tunewright_trainer.fields import ROLES, BadField, Names, chat, string

Turns = list[dict[str, str]]


def preference(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Return prompt, chosen and rejected; without a prompt column, the prompt is what both answers begin with.

    Raises:
        BadField: The row does not fit, or both answers are the same.
    """
    chosen, rejected = (_text_or_turns(values, names[field]) for field in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadField(names["rejected"], f"is {_kind(rejected)}, but {names['chosen']} is {_kind(chosen)}")
    if chosen == rejected:
        raise BadField(names["rejected"], f"equals {names['chosen']}, so there is nothing to prefer")
    if values.get(names["prompt"]) is not None:
        prompt = _text_or_turns(values, names["prompt"])
        if isinstance(prompt, str) and not isinstance(chosen, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str) != isinstance(chosen, str):
            raise BadField(names["chosen"], f"is {_kind(chosen)}, but {names['prompt']} is {_kind(prompt)}")
        # Public data often repeats the prompt at the head of each answer.
        if not isinstance(chosen, str) and len(chosen) > 1:
            prompt, chosen, rejected = _split_turns(chosen, rejected, names)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_text(chosen, rejected, names)
    else:
        prompt, chosen, rejected = _split_turns(chosen, rejected, names)
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(answer, names[field])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def unpaired_preference(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Return prompt, completion and label.

    Raises:
        BadField: The row does not fit.
    """
    prompt, completion = (_text_or_turns(values, names[field]) for field in ("prompt", "completion"))
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise BadField(names["completion"], f"is {_kind(completion)}, but {names['prompt']} is {_kind(prompt)}")
    _check_answer(completion, names["completion"])
    label = values[names["label"]]
    if label in (0, 1, "true", "false", "True", "False"):  # csv files have no booleans
        label = label in (1, "true", "True")
    if not isinstance(label, bool):
        raise BadField(names["label"], f"must be true or false, is {label!r}"[:200])
    return {"prompt": prompt, "completion": completion, "label": label}


def labelled(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Return text and label; numbers become the text that they are written as.

    Raises:
        BadField: The row does not fit.
    """
    label = values[names["label"]]
    if isinstance(label, bool | int) or (isinstance(label, float) and label.is_integer()):
        label = str(int(label)) if not isinstance(label, bool) else str(label).lower()
    if not isinstance(label, str):
        raise BadField(names["label"], f"must be a word or a whole number, is {kind_of(label)}")
    if not label.strip():
        raise BadField(names["label"], "is empty")
    return {"text": string(values, names["text"]), "label": label.strip()}


def _text_or_turns(values: Mapping[str, Any], column: str) -> str | Turns:
    if isinstance(values.get(column), list):
        turns: Turns = chat(values, column, "role", "content", {role: role for role in ROLES})
        return turns
    return string(values, column)


def _kind(value: str | Turns) -> str:
    return "text" if isinstance(value, str) else "a list of turns"


def _check_answer(answer: str | Turns, column: str) -> None:
    if isinstance(answer, str):
        if not answer.strip():
            raise BadField(column, "is empty after the prompt")
    elif len(answer) != 1 or answer[0]["role"] != "assistant":
        raise BadField(column, "must be one assistant turn, or a chat that ends with one and begins with the prompt")


def _split_text(chosen: str, rejected: str, names: Names) -> tuple[str, str, str]:
    """Split both texts where they begin to differ, at the last white space before."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:
        shared = min(len(chosen), len(rejected))
    while shared > 0 and not chosen[shared - 1].isspace():
        shared -= 1
    prompt = chosen[:shared].rstrip()
    if not prompt:
        raise BadField(names["chosen"], f"and {names['rejected']} begin differently, and there is no prompt column")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _split_turns(chosen: Any, rejected: Any, names: Names) -> tuple[Turns, Turns, Turns]:
    """Split both chats before the last turn; what stands before must be equal."""
    prompt = chosen[:-1]
    if not prompt or prompt != rejected[:-1]:
        raise BadField(names["chosen"], f"and {names['rejected']} must be chats that differ only in their last turn")
    return prompt, chosen[-1:], rejected[-1:]
