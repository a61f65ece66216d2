"""A model's tensors by name, out of safetensors files, without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright_trainer.merge.readers import Reader


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and where its bytes are."""

    name: str
    dtype: str
    """As safetensors writes it: F32, F16, BF16, I64, U8, ..."""
    shape: tuple[int, ...]
    file: str
    start: int
    """Offset of the first byte in the file."""
    length: int
    """Bytes."""


class Checkpoint:
    """Configuration and tensors of a model folder. Safe to use from several threads."""

    def __init__(self, reader: Reader) -> None:
        """Read the configuration and the headers of all weight files, and compare them with index and file sizes.

        Raises:
            MissingFile: Nothing lies there.
            InvalidModel: No whole model in safetensors: a shard is missing or truncated, the weights are pickles, ...
        """
        raise NotImplementedError

    @property
    def reader(self) -> Reader:
        """Where the files come from."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        raise NotImplementedError

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name, in the order of the files."""
        raise NotImplementedError

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return a tensor, or some rows of its first dimension, in its own format; BF16 as uint16.

        Args:
            name: Of the tensor.
            rows: Step 1. Default: all.
        """
        raise NotImplementedError

    def read_float32(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return a tensor of floats, or some rows of it, as float32."""
        raise NotImplementedError
