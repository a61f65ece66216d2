"""A saved adapter: its configuration and tensors, checked, and what of a base model it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright_trainer.merge.checkpoint import Tensor
from tunewright_trainer.merge.readers import Reader


@dataclass(frozen=True)
class Adapter:
    """An adapter as peft saved it."""

    reader: Reader
    config: Mapping[str, Any]
    """Content of adapter_config.json."""
    tensors: Mapping[str, Tensor]
    """Tensors of adapter_model.safetensors by name."""


def load_adapter(folder: Path, uri: str | None = None) -> Adapter:
    """Read a saved adapter and check what can be told without its base.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        uri: Its name in messages. Default: the path.

    Raises:
        InvalidAdapter: Damaged, empty, not finite, of rank 0, or of a kind that cannot be merged.
    """
    raise NotImplementedError
