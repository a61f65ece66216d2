"""Packed rows: several rows of data in one sequence, none of which sees another.

TRL lays all sequences of a batch end to end, as kernels for many lengths at once (FlashAttention) want it. SDPA then
computes attention between all tokens of the batch and masks nearly all of it away: with batchSize 4 sequences of 1024
tokens that took twice as long as with the sequences in rows of their own. Here they stay in rows, and position ids that
start again at 0 tell transformers where a row of data begins.

Models that carry a state along the sequence (Mamba, linear attention) know the borders only from TRL's layout, so they
keep it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tunewright_trainer.rows import IGNORED


class PackedCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]  # TRL has no types
    """Makes a batch of packed sequences, one in a row; rows of data that are not packed are padded as ever.

    Shapes: B sequences, T tokens.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch. It has position ids or an attention mask: with a mask, transformers sees no borders."""
        batch: dict[str, Tensor] = super().torch_call(examples)
        positions_BT = batch.pop("position_ids")
        if "seq_lengths" in examples[0]:
            del batch["attention_mask"]
            batch["position_ids"] = positions_BT
            # Nothing in its own row precedes a first token.
            batch["labels"][positions_BT == 0] = IGNORED
        return batch


class PackedSFTTrainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's trainer on rows that are packed already."""

    data_collator: Any
    _total_train_tokens: int

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        # Not an argument: with one, TRL leaves the padding token out of the model's configuration.
        self.data_collator = PackedCollator(self.data_collator.pad_token_id, return_position_ids=True)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, and count the tokens, of which TRL takes the first sequence's for all."""
        before = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if "position_ids" in inputs:
            counted = self.accelerator.gather_for_metrics(count_tokens(inputs["position_ids"])).sum().item()
            self._total_train_tokens = before + counted
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss


def count_tokens(positions_BT: Tensor) -> Tensor:
    """Return the number of tokens that are no padding.

    Padding has position 0, as first tokens have. A row of data has two tokens or more, so it has one at position 1 for
    its first one.
    """
    return (positions_BT > 0).sum() + (positions_BT == 1).sum()
