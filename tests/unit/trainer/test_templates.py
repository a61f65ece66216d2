"""Plain-text templates: what prompts become, where answers begin, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright_api.v1alpha1.parts import Dataset
from tunewright_trainer.data_formats import ChosenFormat, choose_format, with_templates
from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.fields import BadField


def chosen(values: dict[str, Any], **settings: Any) -> ChosenFormat:
    """Choose the format of a row under the settings of a data set."""
    dataset = Dataset.model_validate({"train": [{"uri": "s3://data/a.jsonl"}], **settings})
    return with_templates(choose_format("Auto", dataset.columns, values, "line 1"), dataset, values, "line 1")


def test_prompt_template() -> None:
    """Columns stand in their places, braces of the data stay, and the rows are left as plain text."""
    row = {"prompt": "2 + {x}?", "completion": "4", "hint": None}
    found = chosen(row, promptTemplate="Q: {prompt}{hint} A:")
    assert found.row_format == "PlainCompletion"
    assert found.normalise(row) == {"prompt": "Q: 2 + {x}? A:", "completion": "4"}


def test_prompt_template_instead_of_alpacas() -> None:
    """Alpaca rows get the text of the template, not that of the original release."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    found = chosen(row, promptTemplate="{instruction} [{input}] =")
    assert found.normalise(row) == {"prompt": "Add. [1 2] =", "completion": "3"}


def test_response_template() -> None:
    """The answer begins behind the last place where the template stands, and the template is read, not learned."""
    row = {"text": "### Response: is a heading\n### Response: yes"}
    found = chosen(row, responseTemplate="### Response:")
    assert found.row_format == "PlainCompletion"
    prompt = "### Response: is a heading\n### Response:"
    assert found.normalise(row) == {"prompt": prompt, "completion": " yes"}


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ({"prompt": "a", "completion": "b"}, {"promptTemplate": "Q: {question}"}, "no column 'question'"),
        ({"prompt": "a", "completion": "b"}, {"promptTemplate": "Q:"}, "names no column"),
        ({"prompt": "a", "completion": "b"}, {"responseTemplate": "A:"}, "is for rows of format Text"),
        ({"text": "a"}, {"promptTemplate": "{text}"}, "is for rows of format PromptCompletion or Alpaca"),
    ],
)
def test_templates_that_do_not_fit(values: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    """A template for other rows, or for columns that are not there, is refused before any row is read."""
    with pytest.raises(InvalidConfiguration, match=message):
        chosen(values, **settings)


@pytest.mark.parametrize(
    ("text", "message"), [("no such place", "does not hold dataset.responseTemplate"), ("A: ", "has nothing after")]
)
def test_texts_without_an_answer(text: str, message: str) -> None:
    """A row without the template, or without an answer behind it, is named."""
    found = chosen({"text": "A: x"}, responseTemplate="A:")
    with pytest.raises(BadField, match=message):
        found.normalise({"text": text})
