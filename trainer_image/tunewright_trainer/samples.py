"""A few prompts with the answers of the base model and of the tuned one, for people to look at.

Shapes: B prompts, T tokens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunewright_trainer.generation import generation_config
from tunewright_trainer.preference_rows import PreferenceTokenizer
from tunewright_trainer.rows import Row, RowTokenizer, read_rows

SAMPLES = 3
ANSWER_TOKENS = 64
MAX_SECONDS = 20.0
"""Generation stops here; the answers then are what there is. A large model on a CPU would take minutes."""
TEXT_PROMPT_TOKENS = 16
"""Length of the beginning that plain text rows are continued from."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a row: as people read it and as the model does."""

    text: str
    expected: str
    input_ids: list[int]


def read_prompts(path: Path, row_tokenizer: RowTokenizer) -> list[Prompt]:
    """Return the first prompts of a file of rows."""
    rows = list(itertools.islice(read_rows(path), SAMPLES))
    tokenized = row_tokenizer.tokenize(rows, "sample")
    prompts = [
        _prompt(row, t.input_ids, t.prompt_length, row_tokenizer) for row, t in zip(rows, tokenized, strict=True)
    ]
    return [prompt for prompt in prompts if prompt.input_ids]


def read_preference_prompts(path: Path, tokenizer: PreferenceTokenizer) -> list[Prompt]:
    """Return the first prompts of a file of rows with judged answers; expected is the one that people prefer."""
    rows = list(itertools.islice(read_rows(path), SAMPLES))
    field = "chosen" if "chosen" in rows[0] else "completion"
    tokenized = tokenizer.tokenize(rows, (field,), "sample")
    return [Prompt(_plain(row["prompt"]), _plain(row[field]), a.prompt_ids) for row, a in tokenized if a.prompt_ids]


def _plain(text: str | list[dict[str, str]]) -> str:
    return text if isinstance(text, str) else text[-1]["content"]


def _prompt(row: Row, input_ids: list[int], prompt_length: int, row_tokenizer: RowTokenizer) -> Prompt:
    if row_tokenizer.row_format in ("PromptCompletion", "PlainCompletion"):
        return Prompt(row["prompt"], row["completion"], input_ids[:prompt_length])
    if row_tokenizer.row_format == "Messages":
        turns = row["messages"]
        answer = next((i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "assistant"), 0)
        return Prompt(turns[answer - 1]["content"], turns[answer]["content"], input_ids[:prompt_length])
    length = min(TEXT_PROMPT_TOKENS, len(input_ids) // 2)
    decode = row_tokenizer.tokenizer.decode
    beginning = str(decode(input_ids[:length], skip_special_tokens=True))
    rest = str(decode(input_ids[length:], skip_special_tokens=True))
    return Prompt(beginning, rest, input_ids[:length])


@torch.no_grad()  # a sharded model could not train with what it gathers its weights into in inference mode
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[str]:
    """Continue all prompts greedily in one batch."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    padding = [longest - len(prompt.input_ids) for prompt in prompts]
    ids_BT = torch.tensor(
        [[tokenizer.pad_token_id] * pad + p.input_ids for pad, p in zip(padding, prompts, strict=True)]
    )
    mask_BT = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    model.eval()
    with warnings.catch_warnings():
        # Prompt tuning counts its own tokens in; where padding stands in front, attention looks past it either way.
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
        generated_BT = model.generate(  # type: ignore[operator]  # PreTrainedModel does not declare its mixin's methods
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=generation_config(
                model, tokenizer, max_new_tokens=ANSWER_TOKENS, max_seconds=MAX_SECONDS
            ),
        )
    texts: list[str] = tokenizer.batch_decode(generated_BT[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def base_answers(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> list[str]:
    """Continue all prompts before training; an adapter that is not without effect then is switched off."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        with model.disable_adapter():
            return answers(model, tokenizer, prompts)
    return answers(model, tokenizer, prompts)


def as_documents(prompts: Sequence[Prompt], base: Sequence[str], tuned: Sequence[str]) -> list[dict[str, str]]:
    """Return the content of samples.json."""
    return [
        {"prompt": p.text, "expected": p.expected, "base": b, "tuned": t}
        for p, b, t in zip(prompts, base, tuned, strict=True)
    ]
