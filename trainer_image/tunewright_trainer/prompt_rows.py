"""Rows that only ask become token ids, as long as the model may read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from tunewright_trainer.errors import InvalidData, InvalidModel
from tunewright_trainer.rows import BATCH_ROWS, Row, TokenFile, batched, read_rows, write_arrow
from tunewright_trainer.special_tokens import Framer, check_end
from tunewright_trainer.transfer import Advance, ignore

PROMPT_SCHEMA = pa.schema([("prompt", pa.list_(pa.int32())), ("row", pa.string())])
"""`row` is the whole row as JSON, and its place for messages: for the rewards."""


def write_prompts(
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    label: str,
    scratch: Path,
    max_prompt_length: int,
    advance: Advance = ignore,
) -> TokenFile:
    """Tokenise a file of prompts to disk; longer ones lose their beginning, because the end is what is asked.

    Args:
        tokenizer: With its chat template already overridden where the run says so.
        path: Rows of format Prompts.
        label: What the rows are, for messages: "training" or "validation".
        scratch: Where the result goes.
        max_prompt_length: Tokens kept.
        advance: Told the bytes of each row.

    Raises:
        InvalidData: The chat template refuses a row.
        InvalidModel: There is none, and a prompt is a chat; or there is no token that ends an answer.
    """
    check_end(tokenizer)
    cut = 0

    def kept() -> Iterator[dict[str, Any] | None]:
        nonlocal cut
        first = 1
        for batch in batched(read_rows(path, advance), BATCH_ROWS):
            texts = [_rendered(tokenizer, row, f"{label} row {number}") for number, row in enumerate(batch, first)]
            for number, (row, ids) in enumerate(zip(batch, _encoded(tokenizer, texts), strict=True), first):
                cut += len(ids) > max_prompt_length
                document = json.dumps({**row, "place": f"{label} row {number}"})
                yield {"prompt": ids[-max_prompt_length:], "row": document}
            first += len(batch)

    written, dropped = write_arrow(kept(), PROMPT_SCHEMA, scratch / f"{label}.arrow")
    return TokenFile(scratch / f"{label}.arrow", written, dropped, cut)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if tokenizer.chat_template is None:
        return Framer(tokenizer).encode(texts, open_ended=True)
    # A template writes special tokens itself.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _rendered(tokenizer: PreTrainedTokenizerBase, row: Row, place: str) -> str:
    prompt = row["prompt"]
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise InvalidModel(f"{place} is a chat, but the model has no chat template: set model.chatTemplate")
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise InvalidData(
            f"{place}: the chat template refuses it ({error}): correct the order of roles in the row, or set "
            "model.chatTemplate"
        ) from error
