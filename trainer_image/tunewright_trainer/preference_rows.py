"""Rows with better and worse answers become token ids: a prompt, and one or two answers to it.

A prompt is a string or a list of chat turns. With a chat template a string is a chat of one exchange, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tunewright_trainer.errors import InvalidData
from tunewright_trainer.protocol import RowFormat
from tunewright_trainer.rows import (
    BATCH_ROWS,
    IGNORED,
    Row,
    RowTokenizer,
    TokenFile,
    TokenRow,
    batched,
    common_prefix,
    read_rows,
    row_tokenizer,
    write_arrow,
)
from tunewright_trainer.transfer import Advance, ignore

_IDS = pa.list_(pa.int32())
PAIR_SCHEMA = pa.schema([("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS)])
SINGLE_SCHEMA = pa.schema(
    [("prompt_ids", _IDS), ("completion_ids", _IDS), ("KL_completion_ids", _IDS), ("label", pa.bool_())]
)
SCORED_SCHEMA = pa.schema([("chosen_ids", _IDS), ("rejected_ids", _IDS)])


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its answers."""

    prompt_ids: list[int]
    answers: tuple[list[int], ...]
    cut: bool


@dataclass(frozen=True)
class PreferenceTokenizer:
    """Turns prompts and answers into tokens.

    Attributes:
        tokenizer: With its chat template already overridden where the run says so.
        max_length: Tokens kept of prompt and answer together, from the start of the prompt.
        max_prompt_length: Tokens kept of the prompt, from its end; None: no limit of its own.
        needs_end: The model writes answers, so it must learn to stop; one that only reads need not.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int | None
    needs_end: bool = True

    def tokenize(self, rows: Iterable[Row], fields: Sequence[str], label: str) -> Iterator[tuple[Row, Answered]]:
        """Yield every row with its tokens, in order.

        Args:
            rows: Rows with a prompt and answers.
            fields: Names of the answers: chosen and rejected, or completion.
            label: What the rows are, for messages: "training" or "validation".

        Raises:
            InvalidData: The chat template refuses a row.
        """
        first = 1
        for batch in batched(rows, BATCH_ROWS):
            columns = [self._answered(batch, field, label, first) for field in fields]
            for row, *answers in zip(batch, *columns, strict=True):
                yield row, self._limited(answers)
            first += len(batch)

    def whole(self, rows: Iterable[Row], fields: Sequence[str], label: str) -> Iterator[list[list[int]]]:
        """Yield prompt and answer as one sequence for each of the answers, at full length."""
        first = 1
        for batch in batched(rows, BATCH_ROWS):
            columns = [self._answered(batch, field, label, first) for field in fields]
            for answers in zip(*columns, strict=True):
                yield [answer.input_ids for answer in answers]
            first += len(batch)

    def _answered(self, batch: Sequence[Row], field: str, label: str, first: int) -> list[TokenRow]:
        """Tokenise prompt and answer of each row as supervised fine-tuning does."""
        if self.tokenizer.chat_template is None and all(isinstance(row["prompt"], str) for row in batch):
            strings = [{"prompt": row["prompt"], "completion": row[field]} for row in batch]
            return list(self._rows("PromptCompletion").tokenize(strings, label, first))
        # One file may hold texts and turns.
        chats = [{"messages": [*turns(row["prompt"], "user"), *turns(row[field], "assistant")]} for row in batch]
        return list(self._rows("Messages").tokenize(chats, label, first))

    def _rows(self, row_format: RowFormat) -> RowTokenizer:
        # Answers are cut here, once it is clear what the prompt leaves of the length.
        return row_tokenizer(self.tokenizer, row_format, max_length=1 << 30, needs_end=self.needs_end)

    def _limited(self, answers: Sequence[TokenRow]) -> Answered:
        starts = [answer_start(answer) for answer in answers]
        # Tokens may merge across the border differently for each answer: the prompt is what all have in common.
        start = min(*starts, common_prefix(answers[0].input_ids, answers[-1].input_ids))
        prompt = answers[0].input_ids[:start]
        kept = prompt if self.max_prompt_length is None else prompt[-self.max_prompt_length :]
        room = max(0, self.max_length - len(kept))
        ends = [answer.input_ids[start:] for answer in answers]
        cut = len(kept) < len(prompt) or any(len(end) > room for end in ends)
        return Answered(kept, tuple(end[:room] for end in ends), cut)


def turns(said: str | list[dict[str, str]], role: str) -> list[dict[str, str]]:
    """Return what was said as chat turns; a text is one of `role`."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def answer_start(row: TokenRow) -> int:
    """Return where the last answer of a tokenised row begins."""
    labels = row.labels
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    return start


def write_pairs(
    rows: PreferenceTokenizer, path: Path, label: str, scratch: Path, advance: Advance = ignore
) -> TokenFile:
    """Tokenise a file of pairs for DPO.

    Raises:
        InvalidData: No pair is left within the length limit.
    """
    cut = 0

    def kept() -> Iterator[dict[str, Any] | None]:
        nonlocal cut
        for _, answered in rows.tokenize(read_rows(path, advance), ("chosen", "rejected"), label):
            chosen, rejected = answered.answers
            cut += answered.cut
            # Equal beginnings teach nothing: the difference was cut away.
            useful = chosen and rejected and chosen != rejected
            row = {"prompt_ids": answered.prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}
            yield row if useful else None

    written, dropped = write_arrow(kept(), PAIR_SCHEMA, scratch / f"{label}.arrow")
    return _checked(TokenFile(scratch / f"{label}.arrow", written, dropped, cut), label, rows.max_length)


def write_singles(
    rows: PreferenceTokenizer, path: Path, label: str, scratch: Path, batch_size: int, advance: Advance = ignore
) -> TokenFile:
    """Tokenise a file of judged answers for KTO.

    KTO estimates how far the model has moved from answers to other prompts: within each batch every prompt is given
    the answer of the one before (Ethayarajh et al. 2024, section 4.1).

    Raises:
        InvalidData: No answer is left within the length limit.
    """
    cut = 0

    def kept() -> Iterator[dict[str, Any] | None]:
        nonlocal cut
        for row, answered in rows.tokenize(singles(read_rows(path, advance)), ("completion",), label):
            cut += answered.cut
            (answer,) = answered.answers
            yield (
                {"prompt_ids": answered.prompt_ids, "completion_ids": answer, "label": row["label"]} if answer else None
            )

    def mismatched() -> Iterator[dict[str, Any] | None]:
        dropped = 0

        def counted() -> Iterator[dict[str, Any]]:
            nonlocal dropped
            for row in kept():
                if row is None:
                    dropped += 1
                else:
                    yield row

        for batch in batched(counted(), batch_size):
            others = [batch[-1], *batch[:-1]]
            for row, other in zip(batch, others, strict=True):
                yield {**row, "KL_completion_ids": other["completion_ids"]}
        yield from [None] * dropped

    written, dropped = write_arrow(mismatched(), SINGLE_SCHEMA, scratch / f"{label}.arrow")
    return _checked(TokenFile(scratch / f"{label}.arrow", written, dropped, cut), label, rows.max_length)


def singles(rows: Iterable[Row]) -> Iterator[Row]:
    """Take pairs apart into a good and a bad answer; judged answers stay as they are."""
    for row in rows:
        if "chosen" not in row:
            yield row
        else:
            yield {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
            yield {"prompt": row["prompt"], "completion": row["rejected"], "label": False}


def write_scored(
    rows: PreferenceTokenizer, path: Path, label: str, scratch: Path, advance: Advance = ignore
) -> TokenFile:
    """Tokenise a file of pairs for a reward model; pairs with an answer that is too long are left out.

    The score of an answer without its end would say something else.

    Raises:
        InvalidData: No pair is left within the length limit.
    """
    limit = rows.max_length

    def kept() -> Iterator[dict[str, Any] | None]:
        for chosen, rejected in rows.whole(read_rows(path, advance), ("chosen", "rejected"), label):
            fits = len(chosen) <= limit and len(rejected) <= limit
            yield {"chosen_ids": chosen, "rejected_ids": rejected} if fits else None

    written, dropped = write_arrow(kept(), SCORED_SCHEMA, scratch / f"{label}.arrow")
    return _checked(TokenFile(scratch / f"{label}.arrow", written, dropped, cut=0), label, limit)


def _checked(tokens: TokenFile, label: str, limit: int) -> TokenFile:
    if tokens.rows == 0:
        raise InvalidData(
            f"none of the {tokens.dropped} {label} rows fits into {limit} tokens with something to compare: "
            "raise hyperparameters.maxSequenceLength, or shorten the prompts"
        )
    return tokens
