"""Axolotl's data sets: types, columns, templates and paths."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cli.axolotl_kit import BASE, converted, rows, said
from tunewright_cli.axolotl.convert import convert
from tunewright_cli.axolotl.draft import Kind
from tunewright_cli.axolotl.templates import CHATML, LLAMA3


@pytest.mark.parametrize(
    ("changes", "format_", "columns", "template"),
    [
        ({}, "Messages", None, None),
        ({"field_messages": "conversations"}, "Messages", {"messages": "conversations"}, None),
        ({"message_property_mappings": {"role": "from", "content": "value"}}, "ShareGPT", None, None),
        ({"message_field_role": "from", "message_field_content": "value"}, "ShareGPT", None, None),
        ({"type": "sharegpt", "conversation": "chatml"}, "ShareGPT", None, CHATML),
        ({"chat_template": "llama3"}, "Messages", None, LLAMA3),
        ({"chat_template_jinja": "{{ messages }}"}, "Messages", None, "{{ messages }}"),
        ({"chat_template": "tokenizer_default"}, "Messages", None, None),
        ({"chat_template": "gemma"}, "Messages", None, None),
        ({"roles_to_train": ["assistant"], "train_on_eos": "turn"}, "Messages", None, None),
        ({"roles": {"user": ["user"], "assistant": ["assistant"]}}, "Messages", None, None),
        ({"type": "alpaca"}, "Alpaca", None, None),
        ({"type": "completion", "field": "body"}, "Text", {"text": "body"}, None),
        (
            {"type": {"field_instruction": "question", "field_output": "answer", "format": "{instruction}"}},
            "PromptCompletion",
            {"prompt": "question", "completion": "answer"},
            None,
        ),
    ],
)
def test_a_type_becomes_format_columns_and_template(
    changes: dict[str, Any], format_: str, columns: dict[str, str] | None, template: str | None
) -> None:
    """For supervised fine-tuning."""
    spec = rows(**changes)
    assert spec["dataset"]["format"] == format_
    assert spec["dataset"].get("columns") == columns
    assert spec["model"].get("chatTemplate") == template


@pytest.mark.parametrize(
    ("objective", "kind", "columns", "template"),
    [
        ("dpo", "chatml.intel", {"prompt": "question"}, CHATML),
        ("dpo", "llama3.icr", {"prompt": "input"}, LLAMA3),
        (
            "ipo",
            "chatml.argilla",
            {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
            CHATML,
        ),
        ("dpo", "chatml.ultra", None, CHATML),
        ("dpo", "chat_template.argilla_chat", None, None),
        ("dpo", "chat_template.default", {"prompt": "messages"}, None),
        ("dpo", {"field_prompt": "q", "field_chosen": "good"}, {"prompt": "q", "chosen": "good"}, None),
        ("kto", "llama3.argilla", {"prompt": "instruction"}, LLAMA3),
        ("kto", "chatml.prompt_pairs", None, CHATML),
        ("kto", {"field_completion": "a", "field_label": "good"}, {"completion": "a", "label": "good"}, None),
    ],
)
def test_a_preference_type_becomes_columns_and_template(
    objective: str, kind: Any, columns: dict[str, str] | None, template: str | None
) -> None:
    """Axolotl's names for public data sets say which columns they have and how they are written out."""
    # KTO takes two answers at a time or more.
    spec = converted(rl=objective, datasets=[{"path": "s3://datasets/rows.jsonl", "type": kind}], micro_batch_size=2)
    assert spec["dataset"]["format"] == ("UnpairedPreference" if objective == "kto" else "Preference")
    assert spec["dataset"].get("columns") == columns
    assert spec["model"].get("chatTemplate") == template
    assert spec["objective"].get("dpo", {}).get("loss") == ("IPO" if objective == "ipo" else None)


@pytest.mark.parametrize(
    ("source", "uri", "rest"),
    [
        ({"path": "s3://datasets/a/train.csv"}, "s3://datasets/a/train.csv", {}),
        ({"path": "org/name"}, "hf://datasets/org/name", {}),
        ({"path": "org/name", "split": "test", "name": "default"}, "hf://datasets/org/name", {"split": "test"}),
        ({"path": "org/name", "split": "train[:10%]"}, "s3://replace-me/org/name.jsonl", {}),
        ({"path": "org/name", "split": "dev[:9]"}, "hf://datasets/org/name", {"split": "dev", "maxSamples": 9}),
        ({"path": "org/name", "name": "en"}, "s3://replace-me/org/name.jsonl", {}),
        (
            {"path": "org/name", "data_files": "data/a.csv", "revision": "v2"},
            "hf://datasets/org/name/data/a.csv",
            {"revision": "v2"},
        ),
        ({"path": "org/name", "data_files": "*.jsonl"}, "s3://replace-me/-.jsonl", {}),
        ({"path": "data/train.jsonl"}, "s3://replace-me/data/train.jsonl", {}),
        ({"path": "~/.cache/../train set.json"}, "s3://replace-me/cache/train-set.json", {}),
        ({"path": "json", "data_files": "/mnt/a.jsonl"}, "s3://replace-me/mnt/a.jsonl", {}),
        ({"path": "json", "data_files": ["a.arrow"]}, "s3://replace-me/a.jsonl", {}),
        ({"path": "gs://bucket/a.parquet"}, "s3://replace-me/bucket/a.parquet", {}),
        ({"path": "org/name", "split": "train[:500]"}, "hf://datasets/org/name", {"maxSamples": 500}),
        ({"path": "rows.jsonl", "split": "train[:500]"}, "s3://replace-me/rows.jsonl", {"maxSamples": 500}),
    ],
)
def test_a_path_becomes_a_uri(source: dict[str, Any], uri: str, rest: dict[str, Any]) -> None:
    """Files in S3 and on the Hub stay where they are; the others get a place to be put to."""
    config = {**BASE, "datasets": [{"type": "alpaca", **source}]}
    conversion = convert(config, "name")
    assert conversion.document is not None
    assert conversion.document["spec"]["dataset"]["train"] == [{"uri": uri, **rest}]
    to_do = [path for path in said(conversion, Kind.TO_DO) if path]
    assert len(to_do) == (1 if uri.startswith("s3://replace-me") else 0)


def test_rows_of_evaluation_are_the_split_test_of_a_hub_data_set() -> None:
    """Which Axolotl takes where nothing is said."""
    tests = [{"path": "org/name", "type": "alpaca"}, {"path": "org/name", "type": "alpaca", "split": "train"}]
    found = converted(test_datasets=tests)["dataset"]["validation"]
    assert found == [{"uri": "hf://datasets/org/name", "split": "test"}, {"uri": "hf://datasets/org/name"}]


def test_what_is_to_do_names_the_part_of_the_hub_data_set() -> None:
    """Configuration, revision and split, so that the right rows are written out."""
    source = {"path": "org/name", "name": "en", "revision": "v2", "split": "train[:10%]", "type": "alpaca"}
    said_of_it = said(convert({**BASE, "datasets": [source]}, "name"), Kind.TO_DO)["datasets[0].path"]
    assert "org/name, name en, revision v2, split train[:10%]" in said_of_it
