"""The shapes rows may have, and what each becomes for training: pure functions of one row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_api.v1alpha1.parts import Columns, Dataset
from tunewright_api.v1alpha1.spec_rules import FORMATS
from tunewright_trainer import judged_formats, prompt_format
from tunewright_trainer.errors import InvalidConfiguration, InvalidData
from tunewright_trainer.fields import ROLES, BadField, Names, chat, listed, string, tools
from tunewright_trainer.protocol import RowFormat
from tunewright_trainer.templates import check_prompt_template, fill_prompt, split_at_response

Format = Literal[
    "Text", "PromptCompletion", "Messages", "Alpaca", "ShareGPT", "Preference", "UnpairedPreference", "Prompts",
    "Labelled",
]  # fmt: skip
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
    prompt_template: str | None = None
    response_template: str | None = None

    def normalise(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row as the worker reads it.

        Raises:
            BadField: The row does not fit the format.
        """
        shape = _SHAPES[self.name]
        for field in shape.required:
            if self.names[field] not in values:
                raise BadField(self.names[field], f"is missing; the row has {listed(values)}")
        row = shape.normalise(values, self.names)
        if self.prompt_template is not None:
            return {"prompt": fill_prompt(self.prompt_template, values), "completion": row["completion"]}
        if self.response_template is not None:
            return split_at_response(row["text"], self.response_template, self.names["text"])
        return row


def with_templates(chosen: ChosenFormat, dataset: Dataset, first: Mapping[str, Any], place: str) -> ChosenFormat:
    """Return the format with the data set's templates: its rows are plain text then.

    Raises:
        InvalidConfiguration: The rows are of a format that the template is not for, or lack a column that it names.
    """
    for field, template, formats in (
        ("promptTemplate", dataset.prompt_template, ("PromptCompletion", "Alpaca")),
        ("responseTemplate", dataset.response_template, ("Text",)),
    ):
        if template is not None and chosen.name not in formats:
            raise InvalidConfiguration(
                f"dataset.{field} is for rows of format {' or '.join(formats)}, but {place} has format {chosen.name} "
                f"({chosen.why}): remove it, or set dataset.format"
            )
    if dataset.prompt_template is not None:
        check_prompt_template(dataset.prompt_template, first, place)
    if dataset.prompt_template is None and dataset.response_template is None:
        return chosen
    return replace(
        chosen,
        row_format="PlainCompletion",
        prompt_template=dataset.prompt_template,
        response_template=dataset.response_template,
    )


def choose_format(
    wanted: str, columns: Columns | None, first: Mapping[str, Any], place: str, objective: ObjectiveType = "SFT"
) -> ChosenFormat:
    """Settle the format of a data set by its first row.

    Args:
        wanted: dataset.format.
        columns: dataset.columns.
        first: The first row.
        place: Where it stands, for messages.
        objective: What is learned; Auto chooses among the formats that it can learn from.

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
        return _detect(renames, first, place, objective)
    name: Format = wanted  # type: ignore[assignment]  # the schema allows nothing else
    shape = _SHAPES[name]
    foreign = [field for field in renames if field not in shape.required + shape.optional]
    if foreign:
        raise InvalidConfiguration(
            f"dataset.columns.{foreign[0]} is not a field of format {name}, which has {listed(shape.required)}"
        )
    names = _names(shape, renames, first)
    for field in shape.required:
        if names[field] not in first:
            raise InvalidData(f"{place}: format {name}: {_no_column(names[field], first)}; {_rename_hint(field)}")
    return ChosenFormat(name, shape.row_format, names, "set by dataset.format")


def _detect(renames: Names, first: Mapping[str, Any], place: str, objective: ObjectiveType) -> ChosenFormat:
    fitting = [name for name in _SHAPES if _fits(name, renames, first)]
    for name in fitting:
        if name in FORMATS[objective]:
            shape = _SHAPES[name]
            names = _names(shape, renames, first)
            return ChosenFormat(name, shape.row_format, names, f"columns {listed(names[f] for f in shape.required)}")
    if fitting:
        raise InvalidData(
            f"{place}: the rows have format {fitting[0]}, which objective {objective} cannot learn from: it takes "
            f"{_formats(FORMATS[objective])}. Change objective.type, or the rows"
        )
    raise InvalidData(
        f"{place}: columns {listed(first)} fit no format: {_formats(FORMATS[objective])}. Rename with "
        "dataset.columns, for example columns: {prompt: question, completion: answer}"
    )


def _fits(name: Format, renames: Names, first: Mapping[str, Any]) -> bool:
    shape = _SHAPES[name]
    names = _names(shape, renames, first)
    fields = shape.required + shape.optional
    if not all(field in fields for field in renames) or not all(names[f] in first for f in shape.required):
        return False
    return name not in ("Messages", "ShareGPT") or (name == "ShareGPT") == _looks_sharegpt(first[names["messages"]])


def _formats(names: Sequence[str]) -> str:
    return "; ".join(f"{name} ({listed(shape.required)})" for name, shape in _SHAPES.items() if name in names)


def _names(shape: _Shape, renames: Names, first: Mapping[str, Any]) -> dict[str, str]:
    names = {field: renames.get(field, field) for field in shape.required + shape.optional}
    # Chats stand under either name in public data, whatever the names of their fields.
    if "messages" in names and "messages" not in renames and "messages" not in first and "conversations" in first:
        names["messages"] = "conversations"
    return names


def _looks_sharegpt(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _text(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {"text": string(values, names["text"])}


def _prompt_completion(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {field: string(values, names[field]) for field in ("prompt", "completion")}


def _alpaca(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    instruction = string(values, names["instruction"])
    further = values.get(names["input"])
    if further is None or further == "":
        prompt = ALPACA_WITHOUT_INPUT.format(instruction=instruction)
    else:
        prompt = ALPACA_WITH_INPUT.format(instruction=instruction, input=string(values, names["input"]))
    return {"prompt": prompt, "completion": string(values, names["output"])}


def _messages(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    row = _answered_chat(values, names["messages"], "role", "content", {role: role for role in ROLES})
    schemas = tools(values.get(names["tools"]), names["tools"])
    return row if schemas is None else {**row, "tools": schemas}


def _sharegpt(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return _answered_chat(values, names["messages"], "from", "value", SHAREGPT_ROLES)


def _answered_chat(
    values: Mapping[str, Any], column: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> dict[str, Any]:
    messages = chat(values, column, role_key, text_key, roles)
    if all(message["role"] != "assistant" for message in messages):
        raise BadField(column, "has no assistant turn, so there is nothing to learn from")
    return {"messages": messages}


def _no_column(column: str, values: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(column, [str(name) for name in values], n=1, cutoff=0.5)
    nearest = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no column {column!r}: {nearest}The columns are {listed(values)}"


def _rename_hint(field: str) -> str:
    return f"rename with dataset.columns.{field}, or choose another dataset.format"


_SHAPES: dict[Format, _Shape] = {
    "Messages": _Shape("Messages", ("messages",), ("tools",), _messages),
    "ShareGPT": _Shape("Messages", ("messages",), (), _sharegpt),
    "PromptCompletion": _Shape("PromptCompletion", ("prompt", "completion"), (), _prompt_completion),
    "Alpaca": _Shape("PromptCompletion", ("instruction", "output"), ("input",), _alpaca),
    "Text": _Shape("Text", ("text",), (), _text),
    "Preference": _Shape("Preference", ("chosen", "rejected"), ("prompt",), judged_formats.preference),
    "UnpairedPreference": _Shape(
        "UnpairedPreference", ("prompt", "completion", "label"), (), judged_formats.unpaired_preference
    ),
    "Labelled": _Shape("Labelled", ("text", "label"), (), judged_formats.labelled),
    # Last: whatever else a row with a prompt could be, it could also be this.
    "Prompts": _Shape("Prompts", ("prompt",), (), prompt_format.prompts),
}
"""In the order in which Auto tries them: a row with chat turns and a text rendering of them is a chat."""
