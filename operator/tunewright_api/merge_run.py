"""MergeRun: the one document that tells the trainer what to merge, and the key that names a merge by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright_api.base import OutputUri, SpecModel, seconds_of
from tunewright_api.run_config import HubSettings, StorageSettings, canonical_json, resolve_hub
from tunewright_api.v1alpha1.adaptermerge import (
    DEFAULT_DENSITY,
    DEFAULT_SEED,
    WITH_DENSITY,
    AdapterMergeSpec,
    AdapterSource,
    Combination,
    MergeBase,
    QuantizedBase,
    Verification,
)
from tunewright_api.v1alpha1.finetunejob import HubOutput
from tunewright_api.v1alpha1.merged import GgufType, bytes_of
from tunewright_api.v1alpha1.parts import DType

MERGE_RECIPE_VERSION = 1
"""Bumped only when the same document and inputs would merge to other weights."""


class MergeRun(SpecModel):
    """Everything the trainer knows of a merge."""

    version: Literal[1] = 1
    kind: Literal["MergeRun"] = "MergeRun"
    name: Annotated[str, Field(max_length=253)]
    namespace: Annotated[str, Field(max_length=63)]
    attempt: int = Field(default=1, ge=1)
    base: MergeBase | None = None
    """None: the base of the first adapter."""
    adapters: list[AdapterSource]
    combination: Combination | None = None
    """With all defaults filled in; None for one adapter."""
    quantized_base: QuantizedBase = "Original"
    dtype: DType = "Auto"
    max_shard_bytes: int = Field(ge=1)
    verification: Verification = Verification()
    gguf: list[GgufType] = Field(default_factory=list)
    adapter_only: bool = False
    output_uri: OutputUri
    storage: StorageSettings
    hub: HubSettings = HubSettings()
    hub_output: HubOutput | None = None
    stall_seconds: int | None = Field(default=None, ge=1)

    def to_json(self) -> str:
        """Return the canonical document: sorted keys, no white space, unset fields left out."""
        return canonical_json(self.document())


def resolve_combination(spec: AdapterMergeSpec) -> Combination | None:
    """Fill in the defaults of a combination; None for one adapter."""
    if len(spec.adapters) == 1:
        return None
    given = spec.combination or Combination()
    density = given.density if given.density is not None else DEFAULT_DENSITY
    seed = given.seed if given.seed is not None else DEFAULT_SEED
    return given.model_copy(
        update={
            "density": density if given.type in WITH_DENSITY else None,
            "seed": seed if given.type == "DARE" else None,
        }
    )


def build_merge_run(
    spec: AdapterMergeSpec,
    *,
    name: str,
    namespace: str,
    attempt: int,
    storage: StorageSettings,
    hub: HubSettings | None = None,
) -> MergeRun:
    """Render the run document of one attempt; `hub` has the platform's defaults.

    `model_construct` keeps a document of a local run, whose local paths were accepted when the spec was parsed.
    """
    timeouts = spec.retry.timeouts if spec.retry else None
    return MergeRun.model_construct(
        name=name,
        namespace=namespace,
        attempt=attempt,
        base=spec.base,
        adapters=spec.adapters,
        combination=resolve_combination(spec),
        quantized_base=spec.quantized_base,
        dtype=spec.dtype,
        max_shard_bytes=bytes_of(spec.max_shard_size),
        verification=spec.verification or Verification(),
        gguf=list(spec.export.gguf) if spec.export else [],
        adapter_only=spec.output.adapter_only,
        output_uri=spec.output.uri.rstrip("/"),
        storage=storage,
        hub=resolve_hub(spec, hub or HubSettings()),
        hub_output=spec.output.hub,
        stall_seconds=seconds_of(timeouts.stall) if timeouts and timeouts.stall else None,
    )


def merge_run_key(
    run: MergeRun,
    *,
    base_version: str | None,
    adapter_versions: tuple[str, ...],
    tool_versions: Mapping[str, str] | None = None,
) -> str:
    """Name a merge by what determines its result.

    Args:
        run: The document; names, places, credentials, limits and probe prompts in it do not count.
        base_version: Commit of a hub model, or a digest over the ETags of a folder's files; None with adapterOnly.
        adapter_versions: Digest of each adapter, in the order of the document.
        tool_versions: Versions of the tools that shape the result, such as that of llama.cpp.

    Returns:
        The first 16 hex digits of a SHA-256.
    """
    content: dict[str, Any] = {
        "recipe": MERGE_RECIPE_VERSION,
        "merge": {
            "combination": run.combination.document() if run.combination else None,
            "quantizedBase": run.quantized_base,
            "dtype": run.dtype,
            "maxShardBytes": run.max_shard_bytes,
            "gguf": list(run.gguf),
            "adapterOnly": run.adapter_only,
        },
        "base": base_version,
        "adapters": [
            {"version": version, "weight": 1.0 if adapter.weight is None else adapter.weight}
            for adapter, version in zip(run.adapters, adapter_versions, strict=True)
        ],
        **({"tools": dict(tool_versions)} if tool_versions else {}),
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]
