"""Reward models at work: they read a prompt with an answer as they read it when they were trained, and score it.

Shapes: B answers, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunewright_trainer.errors import InvalidModel
from tunewright_trainer.preference_rows import turns
from tunewright_trainer.protocol import RewardModelFolder
from tunewright_trainer.recipe import Setup
from tunewright_trainer.rewards import Answer, Score
from tunewright_trainer.rows import Row, row_tokenizer

SCORED_AT_ONCE = 8
"""Answers in one forward pass: memory does not grow with the number of answers in a step."""


def load_reward_models(setup: Setup) -> list[Score]:
    """Return a scoring function for each reward model of the task; the models stay on the device that trains.

    Raises:
        InvalidModel: One cannot be loaded.
    """
    return [_scorer(setup, folder) for folder in setup.task.reward_models]


def _scorer(setup: Setup, folder: RewardModelFolder) -> Score:
    model, tokenizer = load_reward_model(setup, folder)
    max_length = setup.task.run.hyperparameters.max_sequence_length

    def score(answers: Sequence[Answer]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(answers), SCORED_AT_ONCE):
            ids = token_ids(tokenizer, answers[start : start + SCORED_AT_ONCE], max_length)
            scores += scores_of(model, tokenizer, ids)
        if not all(map(math.isfinite, scores)):
            raise InvalidModel(
                f"the reward model {folder.uri} gives scores that are no numbers: set model.dtype to Float32, or train "
                "the reward model again"
            )
        return scores

    return score


def load_reward_model(
    setup: Setup, folder: RewardModelFolder
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a reward model for scoring, and the tokenizer that it was trained with.

    Raises:
        InvalidModel: The files cannot be loaded.
    """
    base_path = (folder.base_path or setup.task.model_path) if folder.is_adapter else folder.path
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False
        )
        model: PreTrainedModel | PeftModel = AutoModelForSequenceClassification.from_pretrained(
            base_path,
            num_labels=1,
            dtype=setup.precision.weights,
            device_map={"": setup.hardware.device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        # A classifier looks for the last token that is no padding.
        model.config.pad_token_id = tokenizer.pad_token_id
        if folder.is_adapter:
            model = PeftModel.from_pretrained(model, folder.path)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InvalidModel(f"the reward model {folder.uri} cannot be loaded: {error}") from error
    model.eval()
    return model, tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer], max_length: int) -> list[list[int]]:
    """Return prompt and answer as tokens, rendered as the rows of a reward model are; the beginning of what is too
    long is left out, because the score is read at the end."""
    rows: list[Row]
    if tokenizer.chat_template is None and all(isinstance(answer.prompt, str) for answer in answers):
        rows = [{"prompt": answer.prompt, "completion": answer.text} for answer in answers]
        tokenize = row_tokenizer(tokenizer, "PromptCompletion", max_length=1 << 30, needs_end=False).tokenize
    else:
        rows = [{"messages": [*turns(answer.prompt, "user"), *turns(answer.text, "assistant")]} for answer in answers]
        tokenize = row_tokenizer(tokenizer, "Messages", max_length=1 << 30).tokenize
    return [row.input_ids[-max_length:] for row in tokenize(rows, "answer")]


@torch.inference_mode()
def scores_of(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]
) -> list[float]:
    """Score sequences of different lengths in one batch."""
    longest = max(map(len, ids))
    pad = cast("int", tokenizer.pad_token_id)
    ids_BT = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    scores_B = model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)).logits[:, 0]
    scores: list[float] = scores_B.float().tolist()
    return scores
