"""What a FineTuneJob and an AdapterMerge say alike of a merged model's files."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tunewright_api.base import Rule, SpecModel
from tunewright_api.v1alpha1.parts import DType

GgufType = Literal["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"]
DEFAULT_MAX_SHARD_SIZE = "5GB"
"""What transformers writes too."""
_SHARD_SIZE = r"^[1-9][0-9]{0,5}(MB|GB)$"
ShardSize = Annotated[str, Field(pattern=_SHARD_SIZE, max_length=8)]
GgufTypes = Annotated[list[GgufType], Field(min_length=1, max_length=6)]


class MergedOutput(SpecModel):
    """The merged weights that are published beside an adapter."""

    dtype: DType = Field(default="Auto", description="Number format of the merged weights. Auto keeps the base's.")
    max_shard_size: ShardSize = Field(
        default=DEFAULT_MAX_SHARD_SIZE, description="Largest file of weights, such as 500MB or 5GB (decimal)."
    )
    gguf: GgufTypes | None = Field(default=None, description="Also publish GGUF files for llama.cpp, one of each type.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.gguf) || self.gguf.all(t, self.gguf.exists_one(u, u == t))",
            "merge.gguf names a type twice: keep one",
            lambda m: m.gguf is None or len(set(m.gguf)) == len(m.gguf),
        ),
    )


def bytes_of(shard_size: str) -> int:
    """Return the bytes of a size such as 500MB or 5GB (decimal, as transformers counts)."""
    return int(shard_size[:-2]) * {"MB": 10**6, "GB": 10**9}[shard_size[-2:]]
