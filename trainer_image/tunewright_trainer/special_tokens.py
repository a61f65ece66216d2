"""The tokens that a tokenizer puts around a text by itself: each of them once, and none where the text is to go on.

Llama's puts one in front, BERT's one in front and one behind, GPT-2's none. Texts that were rendered elsewhere often
have them already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from tunewright_trainer.errors import InvalidModel


@dataclass(frozen=True)
class Framer:
    """Encodes texts with the tokens that the tokenizer puts around them."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Tokens in front of every text, and behind it."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        ids, is_added = encoded["input_ids"], encoded["special_tokens_mask"]
        first = is_added.index(0)
        last = len(ids) - is_added[::-1].index(0)
        return ids[:first], ids[last:]

    def encode(self, texts: Sequence[str], *, open_ended: bool = False) -> list[list[int]]:
        """Return the tokens of each text, at full length.

        Args:
            texts: The texts.
            open_ended: An answer follows: nothing is put behind.
        """
        front, back = self._added
        # verbose=False: rows longer than the model's context are cut later, the tokenizer's warning would be wrong.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [self._framed(ids, front, [] if open_ended else back) for ids in encoded["input_ids"]]

    def cut(self, ids: list[int], limit: int) -> list[int]:
        """Return the beginning of an encoded text that is too long, with what stands behind every text."""
        _, back = self._added
        return ids if len(ids) <= limit else [*ids[: max(0, limit - len(back))], *back][:limit]

    @staticmethod
    def _framed(ids: list[int], front: list[int], back: list[int]) -> list[int]:
        begun, ended = ids[: len(front)] == front, not back or ids[-len(back) :] == back
        return [*([] if begun else front), *ids, *([] if ended else back)]


def check_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without end-of-sequence token.

    Raises:
        InvalidModel: Saying what to set.
    """
    if tokenizer.eos_token_id is None:
        raise InvalidModel(
            "the tokenizer has no end-of-sequence token, so the model could not learn to stop: "
            "set eos_token in tokenizer_config.json"
        )
