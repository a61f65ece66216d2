"""Formats: what Auto chooses, what rows become, which rows are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunewright_api.v1alpha1.parts import Columns
from tunewright_trainer.data_formats import choose_format
from tunewright_trainer.errors import InvalidConfiguration, InvalidData
from tunewright_trainer.fields import BadField

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def normalise(values: dict[str, Any], wanted: str = "Auto", columns: Columns | None = None) -> dict[str, Any]:
    """Treat a row as the first and only one."""
    return choose_format(wanted, columns, values, "f: line 1").normalise(values)


@pytest.mark.parametrize(
    ("values", "name", "normalised"),
    [
        ({"text": "Hi"}, "Text", {"text": "Hi"}),
        ({"prompt": "Q", "completion": "A", "id": 1}, "PromptCompletion", {"prompt": "Q", "completion": "A"}),
        ({"messages": CHAT}, "Messages", {"messages": CHAT}),
        ({"conversations": CHAT}, "Messages", {"messages": CHAT}),
        ({"conversations": SHAREGPT}, "ShareGPT", {"messages": CHAT}),
        ({"messages": SHAREGPT, "text": "x"}, "ShareGPT", {"messages": CHAT}),
    ],
)
def test_auto_recognises(values: dict[str, Any], name: str, normalised: dict[str, Any]) -> None:
    """Auto goes by the columns, and says which."""
    chosen = choose_format("Auto", None, values, "f: line 1")
    assert (chosen.name, chosen.normalise(values)) == (name, normalised)
    assert chosen.why.startswith("columns '")


@pytest.mark.parametrize("further", [{"input": "1 2"}, {"input": ""}, {"input": None}, {}])
def test_alpaca_becomes_prompt_and_completion(further: dict[str, Any]) -> None:
    """Alpaca rows get the texts of the original release, with and without an input."""
    row = normalise({"instruction": "Add.", "output": "3", **further})
    assert row["completion"] == "3"
    assert row["prompt"].startswith("Below is an instruction that describes a task")
    assert row["prompt"].endswith("\n\n### Response:\n")
    assert "\n\n### Instruction:\nAdd.\n\n" in row["prompt"]
    assert ("\n\n### Input:\n1 2\n\n" in row["prompt"]) == bool(further.get("input"))


def test_alpaca_text_may_hold_braces() -> None:
    """Braces in the data are text, not places to fill."""
    row = normalise({"instruction": "Explain {x} and {output}", "input": "{}", "output": "y"})
    assert "Explain {x} and {output}" in row["prompt"]


def test_sharegpt_roles_are_translated() -> None:
    """Every public spelling of a role becomes the one that chat templates know."""
    turns = [{"from": role, "value": "x"} for role in ("system", "human", "gpt", "user", "assistant", "observation")]
    roles = [message["role"] for message in normalise({"conversations": turns})["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool"]


def test_columns_are_renamed() -> None:
    """dataset.columns names the column that stands for a field, for a set format and for Auto."""
    columns = Columns(prompt="question", completion="answer")
    values = {"question": "Q", "answer": "A", "text": "x"}
    for wanted in ("Auto", "PromptCompletion"):
        assert normalise(values, wanted, columns) == {"prompt": "Q", "completion": "A"}


@pytest.mark.parametrize(
    ("values", "wanted", "columns", "message"),
    [
        ({"question": "Q", "answer": "A"}, "Auto", None, "columns 'question', 'answer' fit no format: Messages"),
        (
            {"promt": "Q", "completion": "A"},
            "PromptCompletion",
            None,
            "no column 'prompt': did you mean 'promt'? The co",
        ),
        (
            {"a": "Q"},
            "Text",
            None,
            "no column 'text': The columns are 'a'; rename with dataset.columns.text, or choose",
        ),
        ({"question": "Q"}, "Auto", Columns(prompt="qestion"), "dataset.columns.prompt: there is no column 'qestion'"),
    ],
)
def test_a_missing_column_is_named(values: dict[str, Any], wanted: str, columns: Columns | None, message: str) -> None:
    """A column that is not there fails at the first row, with the columns that are and the nearest name."""
    with pytest.raises(InvalidData) as caught:
        choose_format(wanted, columns, values, "f: line 1")
    assert str(caught.value).startswith("f: line 1: ")
    assert message in str(caught.value)


def test_a_rename_that_the_format_ignores_is_refused() -> None:
    """Nothing is accepted and ignored."""
    with pytest.raises(InvalidConfiguration, match=r"dataset\.columns\.text is not a field of format Alpaca"):
        choose_format("Alpaca", Columns(text="t"), {"instruction": "a", "output": "b", "t": "x"}, "f: line 1")


def turn(role: Any = "user", content: Any = "Hi", **more: Any) -> dict[str, Any]:
    """Build one turn of a chat."""
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"text": ""}, "text", "is empty"),
        ({"text": " \n"}, "text", "is empty"),
        ({"text": None}, "text", "must be a string, is null"),
        ({"text": 3}, "text", "must be a string, is a number"),
        ({"text": True}, "text", "must be a string, is true or false"),
        ({"text": "\ud800"}, "text", "holds half of a surrogate pair, which is no character"),
        ({"prompt": "Q", "completion": ""}, "completion", "is empty"),
        ({"prompt": CHAT, "completion": "A"}, "prompt", "must be a string, is a list; chats have format Messages"),
        ({"instruction": "Q", "output": "A", "input": 3}, "input", "must be a string, is a number"),
        ({"messages": []}, "messages", "is an empty list"),
        ({"messages": "Hi"}, "messages", "must be a list of turns, is a string"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object with 'role' and 'content', is a string"),
        ({"messages": [turn()]}, "messages", "has no assistant turn, so there is nothing to learn from"),
        (
            {"messages": [turn(), turn("bot")]},
            "messages[1].role",
            "unknown role 'bot': known are 'assistant', 'system'",
        ),
        ({"messages": [turn(None)]}, "messages[0].role", "unknown role None"),
        ({"messages": [turn([])]}, "messages[0].role", "unknown role []"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing; the turn has 'content'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing; there are 'role'"),
        ({"messages": [turn(), turn("assistant", "")]}, "messages[1].content", "is empty"),
        ({"messages": [turn(content=[{"type": "text"}])]}, "messages[0].content", "must be a string, is a list"),
        (
            {"messages": [turn("assistant", None, tool_calls=[{}])]},
            "messages[0].tool_calls[0]",
            "must be an object with function",
        ),
        ({"messages": [turn("user", "x", tool_calls=[{"name": "f"}])]}, "messages[0].tool_calls", "only an assistant"),
        ({"messages": CHAT, "tools": "{"}, "tools", "is no JSON"),
        ({"messages": CHAT, "tools": [1]}, "tools", "must be a list of tool schemas"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from", "unknown role 'alien'"),
    ],
)
def test_a_bad_field_is_named(values: dict[str, Any], field: str, message: str) -> None:
    """What is wrong with a row comes with the field, down to the turn of a chat."""
    with pytest.raises(BadField) as caught:
        normalise(values)
    assert caught.value.field == field
    assert caught.value.message.startswith(message)


def test_an_empty_system_turn_is_fine() -> None:
    """Chat templates make something of an empty system turn; data sets have them to switch the default off."""
    messages = [turn("system", ""), *CHAT]
    assert normalise({"messages": messages}) == {"messages": messages}


def test_a_later_row_without_the_column() -> None:
    """Only the first row settles the format; a later one that lacks a column is a bad row."""
    chosen = choose_format("Auto", None, {"prompt": "Q", "completion": "A"}, "f: line 1")
    with pytest.raises(BadField) as caught:
        chosen.normalise({"prompt": "Q"})
    assert (caught.value.field, caught.value.message) == ("completion", "is missing; the row has 'prompt'")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "call",
    [CALL, CALL["function"], {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
    ids=["as chat templates read it", "bare", "arguments as text"],
)
@pytest.mark.parametrize("schemas", [[SCHEMA], json.dumps([SCHEMA])], ids=["list", "text"])
def test_tool_calls(call: dict[str, Any], schemas: object) -> None:
    """Calls and tool schemas keep their content, in the one form that chat templates read."""
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    row = normalise({"messages": turns, "tools": schemas})
    assert row["tools"] == [SCHEMA]
    assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert row["messages"][2] == {"role": "tool", "name": "weather", "content": "rain"}
