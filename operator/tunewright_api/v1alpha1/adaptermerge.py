"""AdapterMerge: the custom resource that merges adapters into their base model. Its status is in `status.py`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from tunewright_api.base import AdapterUri, Duration, ModelUri, Quantity, Rule, SpecModel
from tunewright_api.v1alpha1.finetunejob import NAME_RULES, HubOutput, Metadata, Output, Retry, immutable
from tunewright_api.v1alpha1.merged import DEFAULT_MAX_SHARD_SIZE, GgufTypes, ShardSize
from tunewright_api.v1alpha1.parts import ArtifactRef, DType, HubRef, StorageRef
from tunewright_api.v1alpha1.pod import Pod

KIND = "AdapterMerge"
PLURAL = "adaptermerges"
CombinationType = Literal["Linear", "Concatenate", "SVD", "TIES", "DARE", "MagnitudePrune"]
QuantizedBase = Literal["Original", "Dequantized"]
WITH_DENSITY = ("TIES", "DARE", "MagnitudePrune")
DEFAULT_DENSITY = 0.5
"""Share of the values kept by TIES, DARE and MagnitudePrune: half of them, where nobody says otherwise."""
DEFAULT_SEED = 42
"""Of DARE, which drops values at random: the same merge gives the same weights."""
DEFAULT_MAX_LORA_RANK = 16
"""vLLM's own `--max-lora-rank`."""


class MergeBase(SpecModel):
    """The base model."""

    uri: ModelUri = Field(
        description="Where the model lies: hf://organisation/name, s3://bucket/prefix or pvc://claim/path."
    )
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Branch, tag or commit of an hf:// model. Default: its main branch."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.revision) || self.uri.startsWith('hf://')",
            "base.revision is only for hf:// models: an s3:// or pvc:// folder has no revisions",
            lambda b: b.revision is None or b.uri.startswith("hf://"),
        ),
    )


class AdapterSource(ArtifactRef):
    """An adapter: the result of a FineTuneJob by name, or by address."""

    uri: AdapterUri | None = Field(
        default=None,
        description="Address of a published run's folder, of its manifest.json, of its adapter, or of an output folder "
        "(its newest run); or a folder with adapter_config.json that peft wrote: s3://, pvc:// or "
        "hf://organisation/name.",
    )
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Branch, tag or commit of an hf:// adapter. Default: its main branch."
    )
    weight: Annotated[float, Field(ge=-100, le=100)] | None = Field(
        default=None, description="Share of this adapter among several. Default: 1."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        *ArtifactRef.RULES,
        Rule(
            "!has(self.revision) || (has(self.uri) && self.uri.startsWith('hf://'))",
            "revision of an adapter is only for hf:// adapters: an s3:// or pvc:// folder has no revisions",
            lambda a: a.revision is None or (a.uri is not None and a.uri.startswith("hf://")),
        ),
        Rule(
            "!has(self.weight) || self.weight != 0.0",
            "weight of an adapter may not be 0, by which it would not be there: remove the adapter",
            lambda a: a.weight != 0,
        ),
    )


class Combination(SpecModel):
    """How several LoRA adapters become one, by peft's own methods."""

    type: CombinationType = Field(
        default="Concatenate",
        description="Concatenate adds the weighted changes exactly, at the sum of the ranks; Linear adds weighted "
        "matrices of one rank, which only comes near that; SVD brings that sum to one rank; TIES (Yadav et al. 2023), "
        "DARE (Yu et al. 2023) and MagnitudePrune drop a part of the values first.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Share of the values that TIES, DARE and MagnitudePrune keep. Default: 0.5."
    )
    svd_rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Rank of the result of SVD. Default: the largest rank of the adapters."
    )
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] | None = Field(
        default=None, description="Seed of DARE, which drops values at random. Default: 42."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.density) || (has(self.type) && self.type in ['TIES', 'DARE', 'MagnitudePrune'])",
            "combination.density is only for TIES, DARE and MagnitudePrune: remove it or change combination.type",
            lambda c: c.density is None or c.type in WITH_DENSITY,
        ),
        Rule(
            "!has(self.svdRank) || (has(self.type) && self.type == 'SVD')",
            "combination.svdRank is only for SVD: remove it or change combination.type",
            lambda c: c.svd_rank is None or c.type == "SVD",
        ),
        Rule(
            "!has(self.seed) || (has(self.type) && self.type == 'DARE')",
            "combination.seed is only for DARE, the others draw no lots: remove it or change combination.type",
            lambda c: c.seed is None or c.type == "DARE",
        ),
    )


class VllmCheck(SpecModel):
    """Whether vLLM can serve the adapters as they are, beside merging them."""

    max_lora_rank: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=DEFAULT_MAX_LORA_RANK, description="The server's --max-lora-rank."
    )
    required: bool = Field(default=False, description="Whether the merge fails where vLLM could not serve them.")


class Verification(SpecModel):
    """What the merged model is tried with. The checks themselves are always made."""

    prompts: Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=32)] | None = Field(
        default=None, description="Prompts of your own, besides the built-in ones."
    )
    max_divergence: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        default=None,
        description="Largest difference of a logit between merged model and base with adapter. Default: what rounding "
        "to the number format can explain.",
    )
    vllm: VllmCheck | None = Field(default=None, description="Also tell whether vLLM can serve the adapters.")


class Export(SpecModel):
    """Other forms of the merged model."""

    gguf: GgufTypes = Field(description="GGUF files for llama.cpp, one of each type.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.gguf.all(t, self.gguf.exists_one(u, u == t))",
            "export.gguf names a type twice: keep one",
            lambda e: len(set(e.gguf)) == len(e.gguf),
        ),
    )


class MergeOutput(Output):
    """Where the result goes, and as what."""

    hub: HubOutput | None = Field(
        default=None, description="Also push the merged model (or adapter) with its card to the Hub, once published."
    )
    adapter_only: bool = Field(
        default=False, description="Publish the combination of several adapters as an adapter, without merging it."
    )


class MergeResources(SpecModel):
    """What a merge pod asks for. It needs no GPU, and memory for one layer rather than for the model."""

    cpu: Quantity | None = Field(default=None, description="CPU request. Default: the platform's.")
    memory: Quantity | None = Field(default=None, description="Memory request and limit. Default: the platform's.")
    ephemeral_storage: Quantity | None = Field(
        default=None, description="Disk: models from the Hub and GGUF files pass through it. Default: the platform's."
    )


MERGE_REQUIRED_IMMUTABLE = ("adapters", "output")
MERGE_OPTIONAL_IMMUTABLE = (
    "base", "combination", "quantizedBase", "dtype", "maxShardSize", "verification", "export", "storage", "hub",
    "resources", "pod",
)  # fmt: skip
MERGE_IMMUTABLE_MESSAGE = "is immutable: create an AdapterMerge with another name instead"


class AdapterMergeSpec(SpecModel):
    """Which adapters to merge into what, and where to put it."""

    suspend: bool = Field(default=False, description="True removes the pod; false again starts a new attempt. Mutable.")
    base: MergeBase | None = Field(
        default=None,
        description="The base model. Default: the one that the first adapter was trained on. One on a volume must be "
        "named: only volumes that the spec names are mounted.",
    )
    adapters: list[AdapterSource] = Field(
        min_length=1, max_length=16, description="The adapters; several are combined into one first."
    )
    combination: Combination | None = Field(
        default=None, description="How several adapters become one. Default: Concatenate."
    )
    quantized_base: QuantizedBase = Field(
        default="Original",
        description="For QLoRA adapters: merge into the original weights, or into what is left of them after "
        "quantization, which the adapter was trained on.",
    )
    dtype: DType = Field(default="Auto", description="Number format of the merged weights. Auto keeps the base's.")
    max_shard_size: ShardSize = Field(
        default=DEFAULT_MAX_SHARD_SIZE, description="Largest file of weights, such as 500MB or 5GB (decimal)."
    )
    verification: Verification | None = Field(default=None, description="What the merged model is tried with.")
    export: Export | None = Field(default=None, description="Other forms of the merged model: GGUF.")
    output: MergeOutput
    storage: StorageRef | None = Field(default=None, description="The S3 service and its credentials.")
    hub: HubRef | None = Field(default=None, description="The Hugging Face Hub and its token.")
    resources: MergeResources | None = Field(default=None, description="What the pod asks for.")
    pod: Pod | None = Field(default=None, description="Placement and identity of the pod.")
    retry: Retry | None = Field(default=None, description="Restarts and time limits. Mutable.")
    ttl_after_finished: Duration | None = Field(
        default=None,
        description="Removes Jobs and pods this long after the end; the AdapterMerge stays. Mutable.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.combination) || size(self.adapters) > 1",
            "combination is only for several adapters: remove it or add an adapter",
            lambda s: s.combination is None or len(s.adapters) > 1,
        ),
        Rule(
            "size(self.adapters) > 1 || !has(self.adapters[0].weight)",
            "adapters[0].weight is a share among several adapters, and there is one: remove it",
            lambda s: len(s.adapters) > 1 or s.adapters[0].weight is None,
        ),
        Rule(
            "!(has(self.output.adapterOnly) && self.output.adapterOnly) || size(self.adapters) > 1",
            "output.adapterOnly publishes the combination of several adapters, and there is one: remove it",
            lambda s: not s.output.adapter_only or len(s.adapters) > 1,
        ),
        Rule(
            "!(has(self.output.adapterOnly) && self.output.adapterOnly) || !has(self.export)",
            "export needs a merged model, which output.adapterOnly does not make: remove one of them",
            lambda s: not s.output.adapter_only or s.export is None,
        ),
    )

    @classmethod
    def transition_rules(cls) -> list[dict[str, str]]:
        """Return the immutability rules; the API server checks them, an update is never seen by Python."""
        rules = [(f, immutable(f, required=True)) for f in MERGE_REQUIRED_IMMUTABLE]
        rules += [(f, immutable(f, required=False)) for f in MERGE_OPTIONAL_IMMUTABLE]
        return [{"rule": rule, "message": f"spec.{field} {MERGE_IMMUTABLE_MESSAGE}"} for field, rule in rules]


class AdapterMerge(SpecModel):
    """An AdapterMerge as a user writes it (status and server-side metadata are not looked at)."""

    model_config = ConfigDict(title=KIND)
    api_version: Literal["tunewright.dev/v1alpha1"] = "tunewright.dev/v1alpha1"
    kind: Literal["AdapterMerge"] = "AdapterMerge"
    metadata: Metadata
    spec: AdapterMergeSpec
    status: dict[str, Any] | None = None

    RULES: ClassVar[tuple[Rule, ...]] = NAME_RULES
