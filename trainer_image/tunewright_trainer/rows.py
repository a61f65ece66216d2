"""Rows become token ids and labels: the one place that decides which tokens the model learns.

Text                 every token, an end-of-sequence token added
PromptCompletion     the completion and an end-of-sequence token; with a chat template the row is a chat of one
                     exchange instead, because an instruct model tuned on plain text loses its format
Messages             every assistant turn that answers something, its end-of-turn token included

Chat templates need no markers for this: an answer begins where the template, asked for the next turn, ends, and it
ends where the template ends the chat so far.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from tunewright_trainer.errors import InvalidConfiguration, InvalidData, InvalidModel
from tunewright_trainer.protocol import RowFormat
from tunewright_trainer.special_tokens import Framer, check_end
from tunewright_trainer.transfer import Advance, ignore

IGNORED = -100
"""Label of a token that is read but not learned (PyTorch's ignore_index)."""
BATCH_ROWS = 512
"""Rows tokenised at once: enough for the tokenizer's threads, little enough for memory."""

T = TypeVar("T")
Row = dict[str, Any]
Message = dict[str, Any]
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row; `labels` holds the token at its own position, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False
    """Was longer than the limit."""

    @property
    def is_learnable(self) -> bool:
        """Tell whether a label is left; the first one never counts, nothing precedes it."""
        return any(label != IGNORED for label in self.labels[1:])

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first learned one; 0 where everything is learned."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


@dataclass(frozen=True)
class TokenFile:
    """Tokenised rows on disk, in the format that `datasets.Dataset.from_file` maps into memory."""

    path: Path
    rows: int
    dropped: int
    """Rows with nothing left to learn from after cutting."""
    cut: int


@dataclass(frozen=True)
class RowTokenizer:
    """Turns rows of one format into tokens.

    Attributes:
        tokenizer: With its chat template already overridden where the run says so.
        row_format: Shape of the rows.
        max_length: Tokens kept per row, from its start.
        chat_template: Template that rows are rendered with; None for plain text.
        learns_all: Prompts are learned as well.
    """

    tokenizer: PreTrainedTokenizerBase
    row_format: RowFormat
    max_length: int
    chat_template: str | None
    learns_all: bool = False

    def tokenize(self, rows: Iterable[Row], label: str, first: int = 1) -> Iterator[TokenRow]:
        """Yield one TokenRow per row, in order.

        Args:
            rows: The rows.
            label: What the rows are, for messages: "training" or "validation".
            first: Number of the first row, for messages.

        Raises:
            InvalidData: The chat template refuses a row or does not tell its turns apart.
        """
        for batch in batched(rows, BATCH_ROWS):
            if self.chat_template is not None:
                tokenized = self._chats(batch, label, first)
            elif self.row_format in ("PromptCompletion", "PlainCompletion"):
                tokenized = self._completions(batch)
            else:
                tokenized = self._texts(batch)
            for row in tokenized:
                yield TokenRow(
                    row.input_ids[: self.max_length],
                    row.labels[: self.max_length],
                    cut=len(row.input_ids) > self.max_length,
                )
            first += len(batch)

    def _texts(self, batch: Sequence[Row]) -> Iterator[TokenRow]:
        for ids in Framer(self.tokenizer).encode([row["text"] for row in batch]):
            ended = self._end(ids)
            yield TokenRow(ended, list(ended))

    def _completions(self, batch: Sequence[Row]) -> Iterator[TokenRow]:
        framer = Framer(self.tokenizer)
        prompts = framer.encode([row["prompt"] for row in batch], open_ended=True)
        wholes = framer.encode([row["prompt"] + row["completion"] for row in batch])
        for prompt, whole in zip(prompts, wholes, strict=True):
            ended = self._end(whole)
            start = 0 if self.learns_all else common_prefix(prompt, ended)
            yield TokenRow(ended, [IGNORED] * start + ended[start:])

    def _chats(self, batch: Sequence[Row], label: str, first: int) -> Iterator[TokenRow]:
        chats = [self._render(row, f"{label} row {number}") for number, row in enumerate(batch, first)]
        texts = list(dict.fromkeys(text for chat in chats for text in chat.texts()))
        ids_of = dict(zip(texts, self._ids(texts), strict=True))
        for chat in chats:
            whole = ids_of[chat.whole]
            labels = list(whole) if self.learns_all else [IGNORED] * len(whole)
            for before, after in chat.answers:
                learned = slice(common_prefix(ids_of[before], whole), common_prefix(ids_of[after], whole))
                labels[learned] = whole[learned]
            yield TokenRow(whole, labels)

    def _render(self, row: Row, place: str) -> RenderedChat:
        messages = as_messages(row, self.row_format)
        try:
            chat = render_chat(self.tokenizer, messages, self.chat_template, row.get("tools"))
        except TemplateError as error:
            raise InvalidData(
                f"{place}: the chat template refuses it ({error}): {_excerpt(row)}. "
                "Correct the order of roles in the row, or set model.chatTemplate"
            ) from error
        if not chat.is_prefix_preserving:
            raise InvalidData(
                f"{place}: the chat template renders earlier turns differently once later ones follow, so it cannot "
                f"be told which tokens are answers: {_excerpt(row)}. "
                "Set model.chatTemplate to one that keeps earlier turns, or split the chat into one row per answer"
            )
        return chat

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # A template writes special tokens itself. verbose=False: rows longer than the model's context are cut here.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _end(self, ids: list[int]) -> list[int]:
        """Add the end-of-sequence token, without which a model never learns to stop."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text; each answer is the text before it and the text up to its end."""

    whole: str
    answers: tuple[tuple[str, str], ...]

    @property
    def is_prefix_preserving(self) -> bool:
        """Tell whether every part is the beginning of the whole."""
        return all(self.whole.startswith(text) for text in self.texts())

    def texts(self) -> Iterator[str]:
        """Return every text that has to be tokenised."""
        return itertools.chain((self.whole,), *self.answers)


def row_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    row_format: RowFormat,
    max_length: int,
    *,
    learns_all: bool = False,
    needs_end: bool = True,
) -> RowTokenizer:
    """Choose how rows of a format are rendered with this tokenizer.

    Args:
        tokenizer: With its chat template already overridden where the run says so.
        row_format: Shape of the rows.
        max_length: Tokens kept per row, from its start.
        learns_all: Prompts are learned as well.
        needs_end: The model writes answers, so it must learn to stop; one that only reads need not.

    Raises:
        InvalidModel: Chats without a chat template, or plain text without an end-of-sequence token.
        InvalidConfiguration: The chat template is not valid Jinja.
    """
    if tokenizer.chat_template is None and row_format == "Messages":
        raise InvalidModel("the rows are chats, but the model has no chat template: set model.chatTemplate")
    if tokenizer.chat_template is None or row_format in ("Text", "PlainCompletion"):
        if needs_end:
            check_end(tokenizer)
        return RowTokenizer(tokenizer, row_format, max_length, None, learns_all)
    return RowTokenizer(tokenizer, row_format, max_length, _training_template(tokenizer), learns_all)


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template to render rows with: the tokenizer's own, unless it rewrites earlier turns.

    Reasoning models' templates drop the thinking of earlier answers; TRL knows training versions of the common ones,
    equal in all else. A chat of one exchange needs none of this, so an unknown template is kept and rows that it does
    not suit are refused by name.
    """
    own = tokenizer.get_chat_template()
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        if render_chat(tokenizer, exchange * 2, own).is_prefix_preserving:
            return own
        return get_training_chat_template(tokenizer) or own
    except TemplateError as error:
        raise InvalidConfiguration(
            f"the chat template cannot render a plain exchange of user and assistant ({error}): set model.chatTemplate"
        ) from error
    except ValueError:  # a template that TRL does not know
        return own


def as_messages(row: Row, row_format: RowFormat) -> list[Message]:
    """Return the row as chat turns."""
    if row_format == "Messages":
        messages: list[Message] = row["messages"]
        return messages
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    chat_template: str | None,
    tools: list[Any] | None = None,
) -> RenderedChat:
    """Render a chat and what stands before and up to the end of each answer.

    An assistant turn that opens the chat answers nothing: it is read, not learned.
    """

    def render(turns: Sequence[Message], *, ask: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            list(turns), chat_template=chat_template, tools=tools, tokenize=False, add_generation_prompt=ask
        )
        return cast("str", text)  # what tokenize=False gives

    # Most chats end with an answer: the chat up to there is the whole, and need not be rendered again.
    whole = render(messages)
    answers = [
        (render(messages[:index], ask=True), whole if index + 1 == len(messages) else render(messages[: index + 1]))
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index > 0
    ]
    return RenderedChat(whole, tuple(answers))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens are equal."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def write_token_file(rows: Iterable[TokenRow], path: Path) -> TokenFile:
    """Write the learnable rows to disk batch by batch, so that memory does not grow with the data."""
    cut = 0

    def kept() -> Iterator[dict[str, Any] | None]:
        nonlocal cut
        for row in rows:
            cut += row.cut
            yield {"input_ids": row.input_ids, "labels": row.labels} if row.is_learnable else None

    written, dropped = write_arrow(kept(), _SCHEMA, path)
    return TokenFile(path, written, dropped, cut)


def write_arrow(rows: Iterable[dict[str, Any] | None], schema: pa.Schema, path: Path) -> tuple[int, int]:
    """Write rows of a schema batch by batch in the format that `datasets.Dataset.from_file` maps into memory.

    Returns:
        The number of rows written, and of those that were None.
    """
    written = dropped = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batched(rows, BATCH_ROWS):
            kept = [row for row in batch if row is not None]
            arrays = [pa.array([row[field.name] for row in kept], type=field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            written += len(kept)
            dropped += len(batch) - len(kept)
    return written, dropped


def read_rows(path: Path, advance: Advance = ignore) -> Iterator[Row]:
    """Yield the rows of a jsonl file; `advance` is told the bytes of each."""
    with path.open("rb") as file:
        for line in file:
            advance(len(line))
            yield json.loads(line)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _excerpt(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
