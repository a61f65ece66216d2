"""What a run says of itself: live progress and the final report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from tunewright_api.base import StatusModel

MAX_REPORT_BYTES = 4096
"""Kubernetes cuts a termination message at this length."""
MAX_PROGRESS_BYTES = 65536

Stage = Literal[
    "Starting", "Fetching", "Checking", "Loading", "Training", "Evaluating", "Combining", "Merging", "Verifying",
    "Exporting", "Publishing", "Finished",
]  # fmt: skip
ShortText = Annotated[str, Field(max_length=1024)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
MAX_METRICS = 24
Metrics = Annotated[dict[Annotated[str, Field(max_length=64)], Finite], Field(max_length=MAX_METRICS)]


class _Document(StatusModel):
    # The image may be the user's own: nothing it says is taken on trust, so unknown fields are refused.
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Progress(_Document):
    """The answer of the supervisor's GET /progress; also `status.progress`."""

    stage: Stage
    step: int = Field(default=0, ge=0)
    total_steps: int | None = Field(default=None, ge=0, description="Known once the data is tokenised.")
    percent: float = Field(default=0.0, ge=0, le=100, description="Share of the current stage or of the steps.")
    epoch: Finite | None = None
    loss: Finite | None = Field(default=None, description="Training loss of the last logged step.")
    eval_loss: Finite | None = Field(default=None, description="Loss on the validation rows, last evaluation.")
    learning_rate: Finite | None = None
    tokens_per_second: Finite | None = None
    eta_seconds: int | None = Field(default=None, ge=0)
    metrics: Metrics | None = Field(
        default=None, description="What the recipe measures besides: rewards, margins, accuracy."
    )
    message: ShortText | None = Field(default=None, description="What the stage does right now, for people.")
    updated_at: str = Field(max_length=64, description="RFC 3339 time of the last change.")
    loss_history: list[tuple[int, Finite]] = Field(
        default_factory=list, max_length=64, description="(step, loss), thinned out to at most 64 points."
    )


class EvaluationResult(_Document):
    """Loss and further metrics on the validation rows before and after training."""

    base: Finite | None = Field(default=None, description="Loss of the base model.")
    tuned: Finite | None = Field(default=None, description="Loss of the tuned model.")
    improvement: Finite | None = Field(default=None, description="base - tuned; positive is better.")
    best_step: int | None = Field(
        default=None, ge=0, description="Step whose weights are the result (evaluation.loadBest)."
    )
    base_metrics: Metrics | None = Field(default=None, description="What else the base model was measured by.")
    tuned_metrics: Metrics | None = Field(default=None, description="What else the tuned model was measured by.")


class PublishedOutput(_Document):
    """The published result."""

    uri: ShortText = Field(description="Folder that PeftModel.from_pretrained or from_pretrained loads.")
    manifest_uri: ShortText = Field(description="The manifest that makes the result valid.")
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] = Field(description="SHA-256 of the manifest.")
    size_bytes: int = Field(ge=0, description="Size of all files together.")
    hub_url: ShortText | None = Field(default=None, description="The pushed commit on the Hub, with output.hub.")
    merged_uri: ShortText | None = Field(
        default=None, description="Folder of the merged model beside the adapter, with output.merge."
    )
    gguf_uris: Annotated[list[ShortText], Field(max_length=16)] | None = Field(
        default=None, description="GGUF files of the result."
    )


class RunPlan(_Document):
    """What the trainer found out before the first step."""

    total_steps: int | None = Field(default=None, ge=0)
    train_rows: int | None = Field(default=None, ge=0)
    validation_rows: int | None = Field(default=None, ge=0)
    dropped_rows: int | None = Field(
        default=None, ge=0, description="Rows with nothing left to learn from after cutting."
    )
    cut_rows: int | None = Field(default=None, ge=0, description="Rows cut at maxSequenceLength.")
    data_format: ShortText | None = None
    dtype: ShortText | None = None
    trainable_parameters: int | None = Field(default=None, ge=0)
    total_parameters: int | None = Field(default=None, ge=0)
    target_modules: list[Annotated[str, Field(max_length=128)]] | None = Field(default=None, max_length=64)
    parallelism: ShortText | None = Field(
        default=None, description="DDP or FSDP, and why; not there for a run in one process."
    )
    continued_from: ShortText | None = Field(
        default=None, description="Manifest of the adapter that training went on from."
    )


class PinnedAdapter(_Document):
    """An adapter as it was found."""

    uri: ShortText = Field(description="Its manifest, or its folder where it has none.")
    version: ShortText = Field(description="Digest of its manifest or of its files, or the commit on the Hub.")
    weight: Finite | None = Field(default=None, description="Its share among several.")


class MergePlan(_Document):
    """What a merge is made of, pinned before the first tensor is read."""

    base_uri: ShortText | None = Field(default=None, description="The base model.")
    base_version: ShortText | None = Field(
        default=None, description="Commit on the Hub, or a digest of the files' versions."
    )
    adapters: list[PinnedAdapter] | None = Field(default=None, max_length=16)
    dtype: ShortText | None = Field(default=None, description="Number format of the merged weights.")
    changed_tensors: int | None = Field(default=None, ge=0, description="Tensors that the adapter changes.")
    total_tensors: int | None = Field(default=None, ge=0)
    shards: int | None = Field(default=None, ge=0, description="Files of weights.")


class MergeVerification(_Document):
    """What was proved of a merged model."""

    passed: bool
    adapter_tensors: int = Field(default=0, ge=0, description="Tensors of the adapter, all of which were used.")
    changed_tensors: int = Field(default=0, ge=0, description="Tensors of the model that differ from the base's.")
    copied_tensors: int = Field(default=0, ge=0, description="Tensors that are the base's, byte for byte.")
    smallest_change: Finite | None = Field(
        default=None, description="Smallest norm of a change, relative to its tensor's."
    )
    largest_change: Finite | None = Field(
        default=None, description="Largest norm of a change, relative to its tensor's."
    )
    prompts: int = Field(default=0, ge=0, description="Prompts that both models were compared on.")
    max_divergence: Finite | None = Field(
        default=None, description="Largest difference of a logit between merged model and base with adapter."
    )
    allowed_divergence: Finite | None = Field(default=None, description="What was allowed.")
    effect: Finite | None = Field(
        default=None, description="Largest difference of a logit that the adapter makes to the base."
    )
    vllm: list[ShortText] | None = Field(
        default=None, max_length=16, description="Why vLLM cannot serve the adapters as they are; empty: it can."
    )
    notes: list[ShortText] | None = Field(default=None, max_length=16, description="What else is worth knowing.")


class RunReport(_Document):
    """Last words of a run: the pod's termination message and, in full, report.json beside the result."""

    version: Literal[1] = 1
    exit_code: int
    reason: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]{0,63}$")] = Field(
        description="What kind of end it was, as condition reason; finer than the exit code, never of another fate."
    )
    message: ShortText = Field(default="", description="What was wrong, where, and what to do.")
    stage: Stage = "Starting"
    step: int = Field(default=0, ge=0)
    total_steps: int | None = Field(default=None, ge=0)
    run_key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None
    cached: bool = Field(default=False, description="The result was there already; nothing was trained.")
    loss: Finite | None = None
    plan: RunPlan | None = None
    evaluation: EvaluationResult | None = None
    output: PublishedOutput | None = None
    train_seconds: Finite | None = None
    merge: MergePlan | None = None
    verification: MergeVerification | None = None

    def to_json(self) -> str:
        """Return the document in at most `MAX_REPORT_BYTES` bytes; first the plan gives way, then further metrics, then
        notes and addresses, then the message."""
        report = self
        if _excess_bytes(report) > 0:
            report = report.model_copy(update={"plan": None})
        if _excess_bytes(report) > 0 and report.evaluation is not None:
            bare = report.evaluation.model_copy(update={"base_metrics": None, "tuned_metrics": None})
            report = report.model_copy(update={"evaluation": bare})
        if _excess_bytes(report) > 0 and report.verification is not None:
            bare_verification = report.verification.model_copy(update={"notes": None, "vllm": None})
            report = report.model_copy(update={"verification": bare_verification})
        if _excess_bytes(report) > 0 and report.merge is not None:
            report = report.model_copy(update={"merge": report.merge.model_copy(update={"adapters": None})})
        excess = _excess_bytes(report)
        if excess > 0:
            # Every character takes at least one byte, so cutting as many as there are bytes too many is enough.
            kept = max(0, len(self.message) - excess - 3)
            report = report.model_copy(update={"message": self.message[:kept] + "..."})
        return report.model_dump_json(by_alias=True, exclude_none=True)


def _excess_bytes(report: RunReport) -> int:
    return len(report.model_dump_json(by_alias=True, exclude_none=True).encode()) - MAX_REPORT_BYTES
