"""Proof that the saved files are the trained model: load them as a user would and compare logits.

Shapes: B probe rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tunewright_trainer.errors import Diverged, VerificationFailed

PROBE_FILE = "probe.safetensors"
PROBE_ROWS = 4
PROBE_TOKENS = 64
_TOKEN_LOGITS_DIMENSIONS = 3
"""Batch, position, vocabulary; a classifier has one row of logits per input."""
FLOAT32_TOLERANCE = 1e-4
"""Largest difference of a float32 logit: other kernels may add in another order."""
ROUNDING_STEPS = 2
"""Largest difference of a 16-bit logit, in rounding steps at the size of the largest logit."""


@dataclass(frozen=True)
class Probe:
    """A few inputs and the logits of the last position (of a classifier: its logits), in float32."""

    ids_BT: torch.Tensor
    logits_BV: torch.Tensor

    def save(self, folder: Path, dtype: str) -> None:
        """Write probe.safetensors; its metadata says which `dtype` the model computed in."""
        tensors = {"input_ids": self.ids_BT, "logits": self.logits_BV}
        save_file(tensors, folder / PROBE_FILE, metadata={"dtype": dtype})


def probe_ids(rows: Sequence[list[int]]) -> torch.Tensor:
    """Return the beginnings of tokenised rows, cut to equal length so that no padding is needed."""
    length = min(PROBE_TOKENS, *map(len, rows))
    return torch.tensor([row[:length] for row in rows], dtype=torch.int64)


@torch.no_grad()
def record_probe(model: PreTrainedModel, ids_BT: torch.Tensor) -> Probe:
    """Run the model on the probe rows.

    Raises:
        Diverged: A logit is NaN or infinite.
    """
    model.eval()
    # The mask is given because a classifier would take a padding token that a row holds for padding.
    ids = ids_BT.to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logits_BV = (logits[:, -1] if logits.dim() == _TOKEN_LOGITS_DIMENSIONS else logits).float().cpu()
    if not logits_BV.isfinite().all():
        raise Diverged("the trained model gives logits that are no numbers: lower hyperparameters.learningRate")
    return Probe(ids_BT, logits_BV.clone())


def tolerance(logits_BV: torch.Tensor, weights: torch.dtype) -> float:
    """Return the largest difference that rounding can explain."""
    if weights is torch.float32:
        return FLOAT32_TOLERANCE
    return ROUNDING_STEPS * torch.finfo(weights).eps * logits_BV.abs().max().item()


def compare(trained: Probe, reloaded: Probe, weights: torch.dtype) -> float:
    """Return the largest difference of logits.

    Raises:
        VerificationFailed: It is more than rounding.
    """
    difference = (trained.logits_BV - reloaded.logits_BV).abs().max().item()
    allowed = tolerance(trained.logits_BV, weights)
    if not difference <= allowed:
        raise VerificationFailed(
            f"the saved files give other logits than the trained model: largest difference {difference:.3g}, "
            f"allowed {allowed:.3g}; nothing is published"
        )
    return difference
