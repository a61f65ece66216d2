"""FineTuneJob: the custom resource that trains. Its status is in `status.py`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from tunewright_api.base import Duration, HubBranch, HubRepository, OutputUri, Quantity, Rule, SpecModel
from tunewright_api.v1alpha1.merged import MergedOutput
from tunewright_api.v1alpha1.method import Method
from tunewright_api.v1alpha1.objective import Objective
from tunewright_api.v1alpha1.parts import Dataset, Evaluation, HubRef, Hyperparameters, Model, StorageRef
from tunewright_api.v1alpha1.pod import Pod
from tunewright_api.v1alpha1.spec_rules import SPEC_RULES, type_of
from tunewright_api.v1alpha1.tracking import Tracking

KIND = "FineTuneJob"
PLURAL = "finetunejobs"
Parallelism = Literal["Auto", "DDP", "FSDP"]
MAX_NAME_LENGTH = 45
"""`<name>-preflight-99` plus a pod suffix of up to five characters must fit the 63 of a host name."""


class HubOutput(SpecModel):
    """A model repository on the Hub that gets the published result, too."""

    repository: HubRepository = Field(
        description="organisation/name (or user/name) of the model repository; created where it is missing."
    )
    private: bool = Field(
        default=True, description="Whether a repository that is created is private. One that is there stays as it is."
    )
    revision: HubBranch | None = Field(
        default=None, description="Branch of the commit; created where it is missing. Default: main."
    )
    commit_message: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        default=None, description="Title of the commit. Default: names the FineTuneJob and the run key."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.repository.contains('--') && !self.repository.contains('..') && "
            "!self.repository.matches('[.-](/|$)') && !self.repository.endsWith('.git')",
            "hub.repository may not have '--' or '..' in it, nor a name that ends with '.', '-' or '.git': the Hub "
            "refuses them",
            lambda h: re.search(r"--|\.\.|[.-](/|$)|\.git$", h.repository) is None,
        ),
        Rule(
            "!has(self.revision) || !self.revision.matches('^[0-9a-f]{40}$')",
            "hub.revision is a branch: nothing can be pushed to a commit",
            lambda h: h.revision is None or re.search(r"^[0-9a-f]{40}$", h.revision) is None,
        ),
    )


class Output(SpecModel):
    """Where the result goes."""

    uri: OutputUri = Field(
        description="Folder of the results: s3://bucket/prefix or pvc://claim/path. Every run gets its own subfolder."
    )
    hub: HubOutput | None = Field(
        default=None, description="Also push the adapter or model with its model card to the Hub, once it is published."
    )


class TrainOutput(Output):
    """Where the result of a training goes, and as what."""

    merge: MergedOutput | None = Field(
        default=None,
        description="Also publish the base model with the adapter merged into it; LoRA, QLoRA and IA3 only.",
    )


class Resources(SpecModel):
    """What a training pod asks for, and how many of them train together."""

    nodes: int = Field(
        default=1, ge=1, le=64, description="Pods that train together, each of which gets all that is asked for here."
    )
    gpus: int = Field(
        default=1, ge=0, le=16, description="GPUs of each pod, one training process on each; 0 trains on the CPU."
    )
    parallelism: Parallelism = Field(
        default="DDP",
        description="How several processes hold the model. DDP: each one all of it. FSDP: each one its share of the "
        "weights, their gradients and optimizer states. Auto: FSDP where the model does not fit one GPU, else DDP.",
    )
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", max_length=253)] = Field(
        default="nvidia.com/gpu", description="Name of the GPU resource on the nodes."
    )
    cpu: Quantity | None = Field(default=None, description="CPU request. Default: the platform's.")
    memory: Quantity | None = Field(default=None, description="Memory request and limit. Default: the platform's.")
    ephemeral_storage: Quantity | None = Field(
        default=None, description="Disk for model, data and results. Default: the platform's."
    )
    shared_memory: Quantity | None = Field(
        default=None, description="Size of /dev/shm; counts as memory. Default: the platform's."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.parallelism) || self.parallelism != 'FSDP' || (has(self.gpus) && self.gpus > 1) || "
            "(has(self.nodes) && self.nodes > 1)",
            "resources.parallelism FSDP spreads a model over several processes: set resources.gpus or "
            "resources.nodes to 2 or more, or remove it",
            lambda r: r.parallelism != "FSDP" or r.nodes * r.processes > 1,
        ),
    )

    @property
    def processes(self) -> int:
        """Training processes of each pod."""
        return max(1, self.gpus)


class Timeouts(SpecModel):
    """Time limits; left out means none."""

    queue: Duration | None = Field(default=None, description="Longest wait for all pods of an attempt to start.")
    run: Duration | None = Field(
        default=None, description="Longest time from the first start to the end, all attempts counted in."
    )
    stall: Duration | None = Field(
        default=None, description="Longest time without a training step before the attempt is started again."
    )


class Retry(SpecModel):
    """What happens after an attempt failed."""

    max_restarts: int = Field(
        default=3,
        ge=0,
        le=99,
        description="Attempts after the first one, for causes that count. Eviction and preemption do not.",
    )
    timeouts: Timeouts | None = Field(default=None, description="Time limits.")


def immutable(field: str, *, required: bool) -> str:
    """Return the CEL rule that a field of the spec never changes."""
    if required:
        return f"self.{field} == oldSelf.{field}"
    return f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"


REQUIRED_IMMUTABLE = ("model", "dataset", "method", "output")
OPTIONAL_IMMUTABLE = ("objective", "hyperparameters", "evaluation", "storage", "hub", "resources", "pod", "tracking")
IMMUTABLE_MESSAGE = "is immutable: create a FineTuneJob with another name instead"


class FineTuneJobSpec(SpecModel):
    """What to train and where to put it."""

    suspend: bool = Field(
        default=False, description="True removes the pods; false again starts a new attempt. Mutable."
    )
    model: Model
    dataset: Dataset
    objective: Objective | None = Field(default=None, description="What is learned. Default: SFT.")
    method: Method
    hyperparameters: Hyperparameters | None = Field(default=None, description="Training arguments.")
    evaluation: Evaluation | None = Field(default=None, description="When to evaluate.")
    output: TrainOutput
    storage: StorageRef | None = Field(default=None, description="The S3 service and its credentials.")
    hub: HubRef | None = Field(default=None, description="The Hugging Face Hub and its token.")
    resources: Resources | None = Field(
        default=None, description="What each pod asks for. Default: one pod with one GPU."
    )
    pod: Pod | None = Field(default=None, description="Placement and identity of the pods.")
    tracking: Tracking | None = Field(default=None, description="TensorBoard files, MLflow and W&B.")
    retry: Retry | None = Field(default=None, description="Restarts and time limits. Mutable.")
    ttl_after_finished: Duration | None = Field(
        default=None,
        description="Removes Jobs and pods this long after the end; the FineTuneJob stays. Mutable.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = SPEC_RULES

    @model_validator(mode="after")
    def _check_extra_of_ppo(self) -> FineTuneJobSpec:
        # No rule: to CEL a map of any values is not there.
        if type_of(self.objective) == "PPO" and self.hyperparameters is not None and self.hyperparameters.extra:
            raise ValueError("hyperparameters.extra is not for objective PPO, whose loop is its own: remove it")
        return self

    @classmethod
    def transition_rules(cls) -> list[dict[str, str]]:
        """Return the immutability rules; the API server checks them, an update is never seen by Python."""
        rules = [(f, immutable(f, required=True)) for f in REQUIRED_IMMUTABLE]
        rules += [(f, immutable(f, required=False)) for f in OPTIONAL_IMMUTABLE]
        return [{"rule": rule, "message": f"spec.{field} {IMMUTABLE_MESSAGE}"} for field, rule in rules]


class Metadata(SpecModel):
    """The part of an object's metadata that the project reads."""

    model_config = ConfigDict(extra="ignore")
    name: str
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


NAME_RULES: tuple[Rule, ...] = (
    Rule(
        f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
        f"metadata.name may have at most {MAX_NAME_LENGTH} characters: Jobs and pods are named after it",
        lambda o: len(o.metadata.name) <= MAX_NAME_LENGTH,
    ),
    Rule(
        "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name may have only lower-case letters, digits and '-': Jobs and pods are named after it",
        lambda o: re.search(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", o.metadata.name) is not None,
    ),
)
"""Of either kind."""


class FineTuneJob(SpecModel):
    """A FineTuneJob as a user writes it (status and server-side metadata are not looked at)."""

    model_config = ConfigDict(title=KIND)
    api_version: Literal["tunewright.dev/v1alpha1"] = "tunewright.dev/v1alpha1"
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: Metadata
    spec: FineTuneJobSpec
    status: dict[str, Any] | None = None

    RULES: ClassVar[tuple[Rule, ...]] = NAME_RULES
