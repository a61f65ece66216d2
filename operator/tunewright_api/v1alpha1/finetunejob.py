"""FineTuneJob: the custom resource that trains. Its status is in `status.py`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from tunewright_api.base import Duration, HubBranch, HubRepository, OutputUri, Quantity, Rule, SpecModel
from tunewright_api.v1alpha1.method import Method, MethodType
from tunewright_api.v1alpha1.objective import Objective, ObjectiveType
from tunewright_api.v1alpha1.parts import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_GRADIENT_ACCUMULATION_STEPS,
    DEFAULT_MAX_SEQUENCE_LENGTH,
    DataFormat,
    Dataset,
    Evaluation,
    HubRef,
    Hyperparameters,
    Model,
    StorageRef,
)
from tunewright_api.v1alpha1.pod import Pod
from tunewright_api.v1alpha1.tracking import Tracking

KIND = "FineTuneJob"
PLURAL = "finetunejobs"
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


class Resources(SpecModel):
    """What the training pod asks for."""

    gpus: int = Field(default=1, ge=0, le=1, description="GPUs; 0 trains on the CPU.")
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


class Timeouts(SpecModel):
    """Time limits; left out means none."""

    queue: Duration | None = Field(default=None, description="Longest wait for the pod of an attempt to start.")
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


FORMATS: dict[ObjectiveType, tuple[DataFormat, ...]] = {
    "SFT": ("Text", "PromptCompletion", "Messages", "Alpaca", "ShareGPT"),
    "DPO": ("Preference",),
    "KTO": ("UnpairedPreference", "Preference"),
    "Reward": ("Preference",),
    "GRPO": ("Prompts",),
    "PPO": ("Prompts",),
    "Classification": ("Labelled",),
}
"""Formats that an objective can learn from; Auto chooses among them."""


CONTINUED_METHODS: tuple[MethodType, ...] = ("LoRA", "QLoRA", "IA3")
"""Methods that can go on from an adapter; peft does not train a loaded prefix or prompt any further."""
CONTINUED_OBJECTIVES: tuple[ObjectiveType, ...] = ("SFT", "DPO", "KTO")
"""Objectives that can go on from an adapter: those that learn tokens."""


def _type_of(objective: Objective | None) -> ObjectiveType:
    return objective.type if objective is not None else "SFT"


_OBJECTIVE = "(has(self.objective) && has(self.objective.type) ? self.objective.type : 'SFT')"


def _format_rule(kind: ObjectiveType) -> Rule:
    names = ", ".join(FORMATS[kind])
    listed = ", ".join(f"'{name}'" for name in ("Auto", *FORMATS[kind]))
    return Rule(
        f"{_OBJECTIVE} != '{kind}' || !has(self.dataset.format) || self.dataset.format in [{listed}]",
        f"objective {kind} learns from rows of format {names}: set dataset.format to one of them or to Auto",
        lambda s: _type_of(s.objective) != kind or s.dataset.format in ("Auto", *FORMATS[kind]),
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _given(block: str, field: str, default: str) -> str:
    """Return CEL for a field of a block that need not be there, itself or in `block`."""
    return f"(has(self.{block}) && has(self.{block}.{field}) ? self.{block}.{field} : {default})"


def _hyperparameter(spec: FineTuneJobSpec, field: str, default: int) -> int:
    given: int | None = getattr(spec.hyperparameters, field, None)
    return default if given is None else given


def _whole_groups(spec: FineTuneJobSpec) -> bool:
    if spec.objective is None or spec.objective.grpo is None:
        return True
    rows = _hyperparameter(spec, "batch_size", DEFAULT_BATCH_SIZE)
    rows *= _hyperparameter(spec, "gradient_accumulation_steps", DEFAULT_GRADIENT_ACCUMULATION_STEPS)
    return rows % spec.objective.grpo.generations == 0


def _answer_fits(spec: FineTuneJobSpec) -> bool:
    if spec.objective is None or spec.objective.grpo is None:
        return True
    grpo = spec.objective.grpo
    limit = _hyperparameter(spec, "max_sequence_length", DEFAULT_MAX_SEQUENCE_LENGTH)
    return (grpo.max_prompt_length or 1) + grpo.max_completion_length <= limit


_HAS_GRPO = "has(self.objective) && has(self.objective.grpo)"
_GRPO_RULES = (
    Rule(
        f"!({_HAS_GRPO}) || {_given('hyperparameters', 'batchSize', str(DEFAULT_BATCH_SIZE))} * "
        f"{_given('hyperparameters', 'gradientAccumulationSteps', str(DEFAULT_GRADIENT_ACCUMULATION_STEPS))} % "
        "(has(self.objective.grpo.generations) ? self.objective.grpo.generations : 8) == 0",
        "objective GRPO compares whole groups of answers: hyperparameters.batchSize (default "
        f"{DEFAULT_BATCH_SIZE}) times gradientAccumulationSteps (default {DEFAULT_GRADIENT_ACCUMULATION_STEPS}) must "
        "be a multiple of grpo.generations (default 8)",
        _whole_groups,
    ),
    Rule(
        f"!({_HAS_GRPO}) || (has(self.objective.grpo.maxPromptLength) ? self.objective.grpo.maxPromptLength : 1) + "
        "(has(self.objective.grpo.maxCompletionLength) ? self.objective.grpo.maxCompletionLength : 256) <= "
        f"{_given('hyperparameters', 'maxSequenceLength', str(DEFAULT_MAX_SEQUENCE_LENGTH))}",
        "grpo.maxPromptLength and grpo.maxCompletionLength (default 256) must fit together into "
        f"hyperparameters.maxSequenceLength (default {DEFAULT_MAX_SEQUENCE_LENGTH}): lower one of them, or raise it",
        _answer_fits,
    ),
)


def _whole_mini_batches(spec: FineTuneJobSpec) -> bool:
    if spec.objective is None or spec.objective.ppo is None:
        return True
    prompts = _hyperparameter(spec, "batch_size", DEFAULT_BATCH_SIZE)
    prompts *= _hyperparameter(spec, "gradient_accumulation_steps", DEFAULT_GRADIENT_ACCUMULATION_STEPS)
    return prompts % spec.objective.ppo.mini_batches == 0


def _ppo_answer_fits(spec: FineTuneJobSpec) -> bool:
    if spec.objective is None or spec.objective.ppo is None:
        return True
    ppo = spec.objective.ppo
    limit = _hyperparameter(spec, "max_sequence_length", DEFAULT_MAX_SEQUENCE_LENGTH)
    return (ppo.max_prompt_length or 1) + ppo.max_completion_length <= limit


_HAS_PPO = "has(self.objective) && has(self.objective.ppo)"
_PPO_RULES = (
    Rule(
        f"{_OBJECTIVE} != 'PPO' || !has(self.evaluation) || "
        "(!(has(self.evaluation.loadBest) && self.evaluation.loadBest) && !has(self.evaluation.earlyStopping))",
        "evaluation.loadBest and earlyStopping are not for objective PPO: remove them",
        lambda s: (
            _type_of(s.objective) != "PPO"
            or s.evaluation is None
            or (not s.evaluation.load_best and s.evaluation.early_stopping is None)
        ),
    ),
    Rule(
        f"{_OBJECTIVE} != 'PPO' || self.method.type in ['LoRA', 'QLoRA']",
        "objective PPO is only for method.type LoRA and QLoRA: its reference is the model without the adapter",
        lambda s: _type_of(s.objective) != "PPO" or s.method.type in ("LoRA", "QLoRA"),
    ),
    Rule(
        f"{_OBJECTIVE} != 'PPO' || !has(self.method.lora) || !has(self.method.lora.dropout) || "
        "self.method.lora.dropout == 0.0",
        "objective PPO trains without dropout, which would change likelihoods that it compares: remove lora.dropout",
        lambda s: _type_of(s.objective) != "PPO" or s.method.lora is None or not s.method.lora.dropout,
    ),
    Rule(
        f"{_OBJECTIVE} != 'PPO' || !has(self.method.lora) || !has(self.method.lora.bias) || "
        "self.method.lora.bias == 'None'",
        "objective PPO compares with the model without its adapter, which trained biases would change as well: remove "
        "lora.bias",
        lambda s: _type_of(s.objective) != "PPO" or s.method.lora is None or s.method.lora.bias == "None",
    ),
    Rule(
        f"!({_HAS_PPO}) || {_given('hyperparameters', 'batchSize', str(DEFAULT_BATCH_SIZE))} * "
        f"{_given('hyperparameters', 'gradientAccumulationSteps', str(DEFAULT_GRADIENT_ACCUMULATION_STEPS))} % "
        "(has(self.objective.ppo.miniBatches) ? self.objective.ppo.miniBatches : 1) == 0",
        "objective PPO splits its rollouts into equal parts: hyperparameters.batchSize (default "
        f"{DEFAULT_BATCH_SIZE}) times gradientAccumulationSteps (default {DEFAULT_GRADIENT_ACCUMULATION_STEPS}) must "
        "be a multiple of ppo.miniBatches",
        _whole_mini_batches,
    ),
    Rule(
        f"!({_HAS_PPO}) || (has(self.objective.ppo.maxPromptLength) ? self.objective.ppo.maxPromptLength : 1) + "
        "(has(self.objective.ppo.maxCompletionLength) ? self.objective.ppo.maxCompletionLength : 256) <= "
        f"{_given('hyperparameters', 'maxSequenceLength', str(DEFAULT_MAX_SEQUENCE_LENGTH))}",
        "ppo.maxPromptLength and ppo.maxCompletionLength (default 256) must fit together into "
        f"hyperparameters.maxSequenceLength (default {DEFAULT_MAX_SEQUENCE_LENGTH}): lower one of them, or raise it",
        _ppo_answer_fits,
    ),
)


def _immutable(field: str, *, required: bool) -> str:
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
    output: Output
    storage: StorageRef | None = Field(default=None, description="The S3 service and its credentials.")
    hub: HubRef | None = Field(default=None, description="The Hugging Face Hub and its token.")
    resources: Resources | None = Field(default=None, description="What the pod asks for. Default: one GPU.")
    pod: Pod | None = Field(default=None, description="Placement and identity of the pod.")
    tracking: Tracking | None = Field(default=None, description="TensorBoard files and MLflow.")
    retry: Retry | None = Field(default=None, description="Restarts and time limits. Mutable.")
    ttl_after_finished: Duration | None = Field(
        default=None,
        description="Removes Jobs and pods this long after the end; the FineTuneJob stays. Mutable.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.evaluation) || has(self.dataset.validation) || has(self.dataset.validationFraction) || "
            "((!has(self.evaluation.strategy) || self.evaluation.strategy == 'None') && "
            "!(has(self.evaluation.loadBest) && self.evaluation.loadBest) && !has(self.evaluation.earlyStopping))",
            "evaluation needs rows to evaluate on: set dataset.validation or dataset.validationFraction",
            lambda s: (
                s.evaluation is None
                or s.dataset.validation is not None
                or s.dataset.validation_fraction is not None
                or (
                    s.evaluation.strategy in (None, "None")
                    and not s.evaluation.load_best
                    and s.evaluation.early_stopping is None
                )
            ),
        ),
        Rule(
            f"!has(self.evaluation) || !has(self.evaluation.metric) || self.evaluation.metric == 'Loss' || "
            f"{_OBJECTIVE} == 'Classification' || (self.evaluation.metric == 'Accuracy' && {_OBJECTIVE} == 'Reward')",
            "evaluation.metric Accuracy is only for objectives Classification and Reward, F1 only for Classification",
            lambda s: (
                s.evaluation is None
                or s.evaluation.metric in (None, "Loss")
                or _type_of(s.objective) == "Classification"
                or (s.evaluation.metric == "Accuracy" and _type_of(s.objective) == "Reward")
            ),
        ),
        Rule(
            f"!has(self.hyperparameters) || !has(self.hyperparameters.neftuneNoiseAlpha) || {_OBJECTIVE} == 'SFT'",
            "hyperparameters.neftuneNoiseAlpha is only for objective SFT",
            lambda s: (
                s.hyperparameters is None
                or s.hyperparameters.neftune_noise_alpha is None
                or _type_of(s.objective) == "SFT"
            ),
        ),
        *(_format_rule(kind) for kind in FORMATS),
        *_GRPO_RULES,
        *_PPO_RULES,
        Rule(
            f"{_OBJECTIVE} == 'SFT' || self.method.type in ['Full', 'LoRA', 'QLoRA']",
            "PrefixTuning, PromptTuning and IA3 are only for objective SFT: use LoRA, QLoRA or Full",
            lambda s: _type_of(s.objective) == "SFT" or s.method.type in ("Full", "LoRA", "QLoRA"),
        ),
        Rule(
            f"!({_OBJECTIVE} in ['DPO', 'KTO']) || !has(self.method.lora) || !has(self.method.lora.bias) || "
            "self.method.lora.bias == 'None'",
            "lora.bias is not for DPO and KTO: their reference is the model without its adapter, and trained bias "
            "terms would stay in it",
            lambda s: (
                _type_of(s.objective) not in ("DPO", "KTO") or s.method.lora is None or s.method.lora.bias == "None"
            ),
        ),
        Rule(
            "!has(self.hyperparameters) || !has(self.hyperparameters.packing) || !self.hyperparameters.packing || "
            f"({_OBJECTIVE} == 'SFT' && !(self.method.type in ['PrefixTuning', 'PromptTuning']))",
            "hyperparameters.packing is only for objective SFT, and not for PrefixTuning and PromptTuning, which would "
            "put their tokens before the first row alone",
            lambda s: (
                s.hyperparameters is None
                or not s.hyperparameters.packing
                or (_type_of(s.objective) == "SFT" and s.method.type not in ("PrefixTuning", "PromptTuning"))
            ),
        ),
        Rule(
            "self.method.type != 'PrefixTuning' || !has(self.hyperparameters) || "
            "!has(self.hyperparameters.gradientCheckpointing) || !self.hyperparameters.gradientCheckpointing",
            "hyperparameters.gradientCheckpointing does not work with PrefixTuning: its keys and values come from no "
            "layer that could compute them again",
            lambda s: (
                s.method.type != "PrefixTuning"
                or s.hyperparameters is None
                or not s.hyperparameters.gradient_checkpointing
            ),
        ),
        Rule(
            f"!has(self.model.continueFrom) || self.method.type in [{_listed(CONTINUED_METHODS)}]",
            "model.continueFrom goes on from an adapter of the methods LoRA, QLoRA and IA3: set method.type to its own",
            lambda s: s.model.continue_from is None or s.method.type in CONTINUED_METHODS,
        ),
        Rule(
            "!has(self.model.continueFrom) || (!has(self.method.lora) && !has(self.method.ia3))",
            "model.continueFrom keeps the settings of the adapter it goes on from: remove method.lora and method.ia3",
            lambda s: s.model.continue_from is None or (s.method.lora is None and s.method.ia3 is None),
        ),
        Rule(
            f"!has(self.model.continueFrom) || {_OBJECTIVE} in [{_listed(CONTINUED_OBJECTIVES)}]",
            f"model.continueFrom is only for objectives that learn tokens: {', '.join(CONTINUED_OBJECTIVES)}",
            lambda s: s.model.continue_from is None or _type_of(s.objective) in CONTINUED_OBJECTIVES,
        ),
    )

    @model_validator(mode="after")
    def _check_extra_of_ppo(self) -> FineTuneJobSpec:
        # No rule: to CEL a map of any values is not there.
        if _type_of(self.objective) == "PPO" and self.hyperparameters is not None and self.hyperparameters.extra:
            raise ValueError("hyperparameters.extra is not for objective PPO, whose loop is its own: remove it")
        return self

    @classmethod
    def transition_rules(cls) -> list[dict[str, str]]:
        """Return the immutability rules; the API server checks them, an update is never seen by Python."""
        rules = [(f, _immutable(f, required=True)) for f in REQUIRED_IMMUTABLE]
        rules += [(f, _immutable(f, required=False)) for f in OPTIONAL_IMMUTABLE]
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


class FineTuneJob(SpecModel):
    """A FineTuneJob as a user writes it (status and server-side metadata are not looked at)."""

    model_config = ConfigDict(title=KIND)
    api_version: Literal["tunewright.dev/v1alpha1"] = "tunewright.dev/v1alpha1"
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: Metadata
    spec: FineTuneJobSpec
    status: dict[str, Any] | None = None

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
            f"metadata.name may have at most {MAX_NAME_LENGTH} characters: Jobs and pods are named after it",
            lambda j: len(j.metadata.name) <= MAX_NAME_LENGTH,
        ),
        Rule(
            "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
            "metadata.name may have only lower-case letters, digits and '-': Jobs and pods are named after it",
            lambda j: re.search(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", j.metadata.name) is not None,
        ),
    )
