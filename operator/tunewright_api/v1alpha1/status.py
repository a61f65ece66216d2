"""Status of a FineTuneJob or AdapterMerge: what the operator says; never read back except where noted."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tunewright_api.base import StatusModel
from tunewright_api.conditions import Condition
from tunewright_api.run_report import EvaluationResult, MergePlan, MergeVerification, Progress, PublishedOutput

MAX_ATTEMPTS_KEPT = 10
Message = Annotated[str, Field(max_length=2048)]


class JobRef(StatusModel):
    """The Job of the current attempt."""

    name: str
    uid: str


class Attempt(StatusModel):
    """One attempt that has ended."""

    number: int
    cause: str = Field(description="Reason of its end.")
    exit_code: int | None = None
    node: str | None = None
    last_step: int | None = None
    start_time: str | None = None
    end_time: str | None = None
    message: Message = ""


class Failure(StatusModel):
    """Why it failed."""

    reason: str
    message: Message = ""
    exit_code: int | None = None


class Plan(StatusModel):
    """Resolved settings, so that nobody has to guess a default."""

    hyperparameters: dict[str, Any] = Field(
        default_factory=dict, description="All training arguments, defaults filled in."
    )
    evaluation: str | None = Field(default=None, description="Resolved evaluation strategy.")
    lora: dict[str, Any] | None = Field(default=None, description="Resolved adapter settings.")
    total_steps: int | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    dropped_rows: int | None = None
    cut_rows: int | None = None
    data_format: str | None = None
    dtype: str | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    target_modules: list[str] | None = None
    parallelism: str | None = Field(
        default=None, description="DDP or FSDP, and why; not there for a run in one process."
    )
    continued_from: str | None = Field(default=None, description="The adapter that training went on from.")


class ResolvedReference(StatusModel):
    """The result that the name of another workload stands for."""

    fine_tune_job: str | None = None
    adapter_merge: str | None = None
    manifest_uri: str
    uri: str | None = Field(default=None, description="Folder of the merged model, of an AdapterMerge.")

    @property
    def kind(self) -> str:
        """Kind of the workload."""
        return "FineTuneJob" if self.adapter_merge is None else "AdapterMerge"

    @property
    def name(self) -> str | None:
        """Its name."""
        return self.fine_tune_job if self.adapter_merge is None else self.adapter_merge


class Usage(StatusModel):
    """What the run has cost so far."""

    gpu_seconds: int = 0
    lost_gpu_seconds: int = Field(default=0, description="Part of gpuSeconds spent in attempts that failed.")


class RunStatus(StatusModel):
    """Observed state. Conditions, counters, `jobRef`, times and `attempts` are the operator's memory."""

    observed_generation: int | None = None
    conditions: list[Condition] = Field(default_factory=list)
    phase: str | None = Field(default=None, description="Summary for people; derived from the conditions.")
    stage: str | None = Field(default=None, description="Stage of the run: Train or Merge.")
    attempt: int = Field(default=0, description="Number of the current attempt, from 1.")
    restarts: int = Field(default=0, description="Attempts that counted towards retry.maxRestarts.")
    free_restarts: int = Field(
        default=0, description="Attempts that the platform ended (eviction, preemption, lost node); they do not count."
    )
    job_ref: JobRef | None = None
    start_time: str | None = Field(default=None, description="When the first pod started.")
    completion_time: str | None = None
    next_attempt_time: str | None = Field(default=None, description="When the next attempt may start (backoff).")
    references: list[ResolvedReference] | None = Field(
        default=None,
        description="Results of other workloads as they were found; all attempts use the same ones.",
    )
    progress: Progress | None = None
    attempts: list[Attempt] = Field(default_factory=list, description=f"Ended attempts, the last {MAX_ATTEMPTS_KEPT}.")
    run_key: str | None = None
    output: PublishedOutput | None = None
    usage: Usage | None = None
    failure: Failure | None = None


class FineTuneJobStatus(RunStatus):
    """Observed state of a FineTuneJob."""

    plan: Plan | None = None
    evaluation: EvaluationResult | None = None


class AdapterMergeStatus(RunStatus):
    """Observed state of an AdapterMerge."""

    plan: MergePlan | None = None
    verification: MergeVerification | None = None
