"""Which tokens are learned, token by token, for every row format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from pydantic import BaseModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunewright_trainer import rows as rows_module
from tunewright_trainer.callback import TokenisingReport
from tunewright_trainer.errors import InvalidConfiguration, InvalidData, InvalidModel
from tunewright_trainer.protocol import RowFormat, StageEvent
from tunewright_trainer.rows import IGNORED, TokenRow, read_rows, row_tokenizer, write_token_file

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
REWRITING_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and not loop.last %}(earlier){% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Marks every answer that is not the last one, so the beginning of a chat changes as it grows."""


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, to be changed by a test."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny)
    return loaded


def tokenize(
    tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, *rows: dict[str, Any], max_length: int = 1000
) -> list[TokenRow]:
    """Tokenise rows."""
    return list(row_tokenizer(tokenizer, row_format, max_length).tokenize(rows, "training"))


def marked(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> list[str]:
    """Return the tokens as text; learned ones stand in square brackets. A label must be the token itself."""
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    texts = [str(tokenizer.decode([token])) for token in row.input_ids]
    return [f"[{text}]" if label != IGNORED else text for text, label in zip(texts, row.labels, strict=True)]


def test_text_is_learned_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token of a text is learned, and an end-of-sequence token is added once."""
    first, second = tokenize(tokenizer, "Text", {"text": "One two."}, {"text": "One<|im_end|>"})
    assert marked(tokenizer, first) == ["[One]", "[ two]", "[.]", "[<|im_end|>]"]
    assert marked(tokenizer, second) == ["[One]", "[<|im_end|>]"]


@pytest.mark.parametrize(
    ("seconds_per_row", "expected"), [(2.0, [(4, 50.0), (7, 87.5), (8, 100.0)]), (0.1, [])], ids=["slow", "fast"]
)
def test_tokenising_says_how_far_it_is(
    seconds_per_row: float, expected: list[tuple[int, float]], tmp_path: Path
) -> None:
    """Every five seconds, and once more after the last row; a file that takes less is not worth a word."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "A"}\n' * 8)
    times = [0.0]
    said: list[BaseModel] = []
    for _ in read_rows(path, TokenisingReport(said.append, path, "training", clock=lambda: times[-1])):
        times.append(times[-1] + seconds_per_row)
    assert said == [
        StageEvent(stage="Loading", message=f"{rows} training rows tokenised", percent=percent)
        for rows, percent in expected
    ]


def test_text_ignores_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Format Text stays as it is, also on a chat model."""
    (row,) = tokenize(tokenizer, "Text", {"text": "Hi"})
    assert tokenizer.chat_template is not None
    assert marked(tokenizer, row) == ["[Hi]", "[<|im_end|>]"]


def test_completion_is_learned_without_a_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Plain prompts are read, completions and their end are learned."""
    tokenizer.chat_template = None
    (row,) = tokenize(tokenizer, "PromptCompletion", {"prompt": "One two", "completion": " three."})
    assert marked(tokenizer, row) == ["One", " two", "[ three]", "[.]", "[<|im_end|>]"]


def test_token_across_the_boundary_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """A token made of the end of the prompt and the start of the completion belongs to the completion."""
    tokenizer.chat_template = None
    (row,) = tokenize(tokenizer, "PromptCompletion", {"prompt": "One two ", "completion": "three."})
    assert marked(tokenizer, row) == ["One", " two", "[ three]", "[.]", "[<|im_end|>]"]


def test_prompt_and_completion_become_an_exchange_on_a_chat_model(tokenizer: PreTrainedTokenizerBase) -> None:
    """With a chat template a prompt is a user turn and a completion the assistant turn that is learned."""
    (row,) = tokenize(tokenizer, "PromptCompletion", {"prompt": "Hi", "completion": "Hello!"})
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt = system + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokens = marked(tokenizer, row)
    assert "".join(tokens[: row.prompt_length]) == prompt
    assert tokens[row.prompt_length :] == ["[Hello]", "[!]", "[<|im_end|>]", "[\n]"]


def test_every_answer_of_a_chat_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """All assistant turns are learned with their ends; system and user turns and all headers are only read."""
    (row,) = tokenize(tokenizer, "Messages", {"messages": CHAT})
    # fmt: off
    assert marked(tokenizer, row) == [
        "<|im_start|>", "system", "\n", "Be", " brief", ".", "<|im_end|>", "\n",
        "<|im_start|>", "user", "\n", "Hi", "<|im_end|>", "\n",
        "<|im_start|>", "ass", "istant", "\n", "[Hello]", "[!]", "[<|im_end|>]", "[\n]",
        "<|im_start|>", "user", "\n", "By", "e", "<|im_end|>", "\n",
        "<|im_start|>", "ass", "istant", "\n", "[See]", "[ you]", "[.]", "[<|im_end|>]", "[\n]",
    ]
    # fmt: on


def test_opening_assistant_turn_is_read_only(tokenizer: PreTrainedTokenizerBase) -> None:
    """A greeting answers nothing, so it is context."""
    greeting = [{"role": "assistant", "content": "Welcome."}, *CHAT[1:3]]
    (row,) = tokenize(tokenizer, "Messages", {"messages": greeting})
    assert [t for t in marked(tokenizer, row) if t.startswith("[")] == ["[Hello]", "[!]", "[<|im_end|>]", "[\n]"]


def test_chat_without_answer_has_nothing_to_learn(tokenizer: PreTrainedTokenizerBase) -> None:
    """A chat that ends with its question is not learnable."""
    (row,) = tokenize(tokenizer, "Messages", {"messages": CHAT[:2]})
    assert not row.is_learnable


def test_template_without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """The mask needs no markers and no special tokens in the template."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (row,) = tokenize(tokenizer, "Messages", {"messages": CHAT[1:3]})
    assert marked(tokenizer, row) == ["user", ":", " Hi", "\n", "ass", "istant", ":", "[ Hello]", "[!]", "[\n]"]


def test_rewriting_template_is_refused_by_row(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that changes earlier turns is fine for one exchange; a longer chat is refused with its number."""
    tokenizer.chat_template = REWRITING_TEMPLATE
    short: dict[str, Any] = {"messages": CHAT[1:3]}
    (row,) = tokenize(tokenizer, "Messages", short)
    assert row.is_learnable
    with pytest.raises(InvalidData, match=r"^training row 2: the chat template renders earlier turns differently"):
        tokenize(tokenizer, "Messages", short, {"messages": CHAT})


def test_reasoning_template_is_replaced_for_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """Qwen3's template, which drops the thinking of earlier answers, still trains on every answer of a chat."""
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
    (row,) = tokenize(tokenizer, "Messages", {"messages": CHAT})
    learned = "".join(token.removeprefix("[").removesuffix("]") for token in marked(tokenizer, row) if token[0] == "[")
    assert "Hello!<|im_end|>" in learned
    assert "See you.<|im_end|>" in learned
    assert "Hi" not in learned


def test_row_that_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    """What a template raises comes out with the row's number and text."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(
        InvalidData, match=r"training row 1: the chat template refuses it \(no system turns\).*Be brief"
    ):
        tokenize(tokenizer, "Messages", {"messages": CHAT})


def test_broken_template_is_the_configuration_s_fault(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that is no Jinja is refused before any row."""
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(InvalidConfiguration, match=r"set model\.chatTemplate"):
        row_tokenizer(tokenizer, "Messages", 100)


def test_chats_need_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Chats on a model without chat template are refused with the remedy."""
    tokenizer.chat_template = None
    with pytest.raises(InvalidModel, match=r"no chat template: set model\.chatTemplate"):
        row_tokenizer(tokenizer, "Messages", 100)


def test_text_needs_an_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Plain text on a tokenizer without end-of-sequence token is refused."""
    tokenizer.eos_token = None
    with pytest.raises(InvalidModel, match="no end-of-sequence token"):
        row_tokenizer(tokenizer, "Text", 100)


@pytest.mark.parametrize(
    ("max_length", "learned"),
    [(38, 4 + 5), (36, 4 + 3), (22, 4), (19, 1), (18, 0)],
    ids=["whole", "second answer cut", "first answer", "one token", "nothing"],
)
def test_rows_are_cut_at_the_end(tokenizer: PreTrainedTokenizerBase, max_length: int, learned: int) -> None:
    """Cutting keeps the start of a row and the labels of what is left."""
    (row,) = tokenize(tokenizer, "Messages", {"messages": CHAT}, max_length=max_length)
    assert len(row.input_ids) == len(row.labels) == max_length
    assert sum(label != IGNORED for label in row.labels) == learned
    assert row.is_learnable == (learned > 0)
    assert row.cut == (max_length < 38)


def test_batches_keep_order_and_count(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come out in order and are numbered through, however they are batched."""
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 2)
    tokenizer.chat_template = REWRITING_TEMPLATE
    good = [{"messages": [CHAT[1], {"role": "assistant", "content": str(n)}]} for n in range(5)]
    found = [tokenizer.decode(row.input_ids) for row in tokenize(tokenizer, "Messages", *good)]
    assert found == [f"[user]Hi<|im_end|>[assistant]{n}<|im_end|>" for n in range(5)]
    with pytest.raises(InvalidData, match="training row 6"):
        tokenize(tokenizer, "Messages", *good, {"messages": CHAT})


def test_token_file_counts_what_it_leaves_out(tmp_path: Path, write_and_read: WriteAndRead) -> None:
    """Rows without a label that counts are dropped and counted; the first label never counts."""
    rows = [
        TokenRow([1, 2, 3], [IGNORED, 2, 3]),
        TokenRow([4], [4]),
        TokenRow([5, 6], [IGNORED, IGNORED], cut=True),
        TokenRow([7, 8], [7, IGNORED]),
        TokenRow([9, 10], [9, 10], cut=True),
    ]
    written = write_token_file(rows, tmp_path / "tokens.arrow")
    assert (written.rows, written.dropped, written.cut) == (2, 3, 2)
    assert write_and_read(rows) == [
        {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]},
        {"input_ids": [9, 10], "labels": [9, 10]},
    ]


WriteAndRead = Callable[[list[TokenRow]], list[dict[str, Any]]]


@pytest.fixture
def write_and_read(tmp_path: Path) -> WriteAndRead:
    """Writes rows and reads them as the trainer does."""
    from datasets import Dataset

    def go(rows: list[TokenRow]) -> list[dict[str, Any]]:
        path = tmp_path / "again.arrow"
        write_token_file(rows, path)
        return list(Dataset.from_file(str(path)))

    return go
