"""Proof that a GGUF file is the model: llama.cpp reads its header, loads it and runs it on a text.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright_trainer.errors import VerificationFailed
from tunewright_trainer.merge.gguf_tools import Finished, Tools

Logits = npt.NDArray[np.float32]
RunTool = Callable[[list[str]], Finished]
PROBE = "The capital of France is Paris. Water boils at 100 degrees Celsius, and ice melts at zero."
"""What every file is tried on: about 20 tokens."""


@dataclass(frozen=True)
class Header:
    """What stands at the beginning of a file, as llama.cpp reads it."""

    architecture: str | None
    file_type: int | None
    """A number of llama_ftype."""
    chat_template: str | None
    elements: dict[str, int]
    """Number of values of every tensor, by name."""
    tensor_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Average over all tensors."""
        return self.tensor_bytes * 8 / sum(self.elements.values())


@dataclass(frozen=True)
class Agreement:
    """How close the predictions of two files are."""

    divergence: float
    """Kullback-Leibler divergence in nats, mean over positions."""
    same_token: float
    """Share of the positions at which both find the same token most likely."""


def read_header(path: Path, tools: Tools, run: RunTool) -> Header:
    """Read the header of a file.

    Raises:
        VerificationFailed: llama.cpp cannot.
    """
    finished = run([str(tools.program), "describe", str(path)])
    if finished.code != 0:
        raise VerificationFailed(f"{path.name}: {finished.last_line()}; nothing is published")
    found: dict[str, Any] = json.loads(finished.output)
    tensors = found["tensors"]
    return Header(
        architecture=found["architecture"],
        file_type=found["fileType"],
        chat_template=found["chatTemplate"],
        elements={tensor["name"]: tensor["elements"] for tensor in tensors},
        tensor_bytes=sum(tensor["bytes"] for tensor in tensors),
    )


def check_header(path: Path, header: Header, file_type: int, template: str | None, base: Header | None) -> None:
    """Compare a header with what was to be written.

    Args:
        path: The file, for messages.
        header: Its header.
        file_type: The number of the type that was asked for.
        template: The tokenizer's chat template; None if it has none.
        base: Header of the file that this one was made from.

    Raises:
        VerificationFailed: Something is missing or different.
    """
    wrong = ""
    if header.architecture is None or not header.elements:
        wrong = f"it has {len(header.elements)} tensors and the architecture {header.architecture}"
    elif header.file_type != file_type:
        wrong = f"its general.file_type is {header.file_type}, not {file_type}"
    elif template is not None and header.chat_template != template:
        found = "no chat template" if header.chat_template is None else "another chat template"
        wrong = f"it has {found} than the tokenizer, so that answers would be worse than the model's"
    elif base is not None and header.elements != base.elements:
        wrong = f"it has {len(header.elements)} tensors, or others, where the unquantized file has {len(base.elements)}"
    if wrong:
        raise VerificationFailed(f"{path.name} is not what was to be written: {wrong}; nothing is published")


def evaluate(path: Path, tools: Tools, threads: int, run: RunTool, text: str = PROBE) -> tuple[list[int], Logits]:
    """Load a file in llama.cpp and run it on a text.

    Returns:
        The text's tokens, and the logits of every position (shape TV).

    Raises:
        VerificationFailed: llama.cpp does not load it, or a logit is no number.
    """
    logits_path = path.with_name(f"{path.name}.logits")
    finished = run([str(tools.program), "evaluate", str(path), str(threads), str(logits_path), text])
    if finished.code != 0:
        said = finished.last_line() or f"exit code {finished.code}"
        raise VerificationFailed(f"{path.name} does not run in llama.cpp: {said}; nothing is published")
    found = json.loads(finished.output)
    logits_TV = np.fromfile(logits_path, dtype=np.float32).reshape(len(found["tokens"]), found["vocabulary"])
    logits_path.unlink()
    if not np.isfinite(logits_TV).all():
        raise VerificationFailed(
            f"{path.name}: llama.cpp computes logits that are no numbers: the model's weights are beyond the range of "
            f"this type; choose BF16 or Q8_0; nothing is published"
        )
    return found["tokens"], logits_TV


def compare(reference_TV: Logits, logits_TV: Logits) -> Agreement:
    """Say how close predictions are to those of the reference."""
    reference, other = _log_probabilities(reference_TV), _log_probabilities(logits_TV)
    divergence_T = (np.exp(reference) * (reference - other)).sum(axis=1)
    same_T = reference_TV.argmax(axis=1) == logits_TV.argmax(axis=1)
    return Agreement(float(divergence_T.mean()), float(same_T.mean()))


def _log_probabilities(logits_TV: Logits) -> npt.NDArray[np.float64]:
    shifted = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    normalised: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalised
