"""TrainRun: the one document that tells the trainer its task, and the key that names a run by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from tunewright_api.base import OutputUri, SpecModel, seconds_of
from tunewright_api.defaults import (
    ResolvedEvaluation,
    ResolvedHyperparameters,
    ResolvedLoRA,
    resolve_evaluation,
    resolve_hyperparameters,
    resolve_ia3,
    resolve_lora,
    resolve_objective,
    resolve_prefix_tuning,
    resolve_prompt_tuning,
)
from tunewright_api.references import with_digests
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec, HubOutput, Parallelism, Resources
from tunewright_api.v1alpha1.merged import MergedOutput
from tunewright_api.v1alpha1.method import IA3, MethodType, PrefixTuning, PromptTuning, Quantization
from tunewright_api.v1alpha1.objective import Objective
from tunewright_api.v1alpha1.parts import Dataset, HubRef, RunModel, StorageRef
from tunewright_api.v1alpha1.tracking import Tracking

RUN_ENVIRONMENT_VARIABLE = "TUNEWRIGHT_RUN"
MAX_RUN_BYTES = 65536
PVC_MOUNT_ROOT = "/mnt/pvc"
"""pvc://claim/path is mounted at /mnt/pvc/claim."""
RECIPE_VERSION = 1
"""Bumped only when the same document and data would train to other results."""


class StorageSettings(SpecModel):
    """How to reach S3; credentials come from the environment, never from here."""

    endpoint: str | None = None
    region: str = "us-east-1"
    path_style: bool = False
    secret_name: str | None = None
    """Name of the Secret the credentials come from; only for messages."""


class HubSettings(SpecModel):
    """How to reach the Hugging Face Hub; the token comes from the environment, never from here."""

    endpoint: str | None = None
    """None: https://huggingface.co."""
    secret_name: str | None = None
    """Name of the Secret the token comes from; only for messages."""


class TrainRun(SpecModel):
    """Everything the trainer knows of its task."""

    version: Literal[1] = 1
    kind: Literal["TrainRun"] = "TrainRun"
    name: Annotated[str, Field(max_length=253)]
    namespace: Annotated[str, Field(max_length=63)]
    attempt: int = Field(default=1, ge=1)
    model: RunModel
    dataset: Dataset
    objective: Objective
    method: MethodType
    lora: ResolvedLoRA | None = None
    quantization: Quantization | None = None
    prefix_tuning: PrefixTuning | None = None
    prompt_tuning: PromptTuning | None = None
    ia3: IA3 | None = None
    hyperparameters: ResolvedHyperparameters
    evaluation: ResolvedEvaluation
    output_uri: OutputUri
    storage: StorageSettings
    hub: HubSettings = HubSettings()
    hub_output: HubOutput | None = None
    merge: MergedOutput | None = None
    """The merged weights to publish as well."""
    gpus: int = Field(ge=0)
    nodes: int = Field(default=1, ge=1)
    """Pods that train together."""
    processes: int = Field(default=1, ge=1)
    """Training processes of each pod."""
    parallelism: Parallelism = "DDP"
    """Not in the run key: it changes the order of sums, not what is trained."""
    stall_seconds: int | None = Field(default=None, ge=1)
    tracking: Tracking | None = None

    @property
    def world_size(self) -> int:
        """Training processes of all pods together; each one takes `batch_size` rows at a time."""
        return self.nodes * self.processes

    @property
    def global_batch_size(self) -> int:
        """Rows of an optimizer step."""
        return self.hyperparameters.batch_size * self.hyperparameters.gradient_accumulation_steps * self.world_size

    def to_json(self) -> str:
        """Return the canonical document: sorted keys, no white space, unset fields left out."""
        return canonical_json(self.document())


class HasPlaces(Protocol):
    """A spec of either kind, as far as it says where things lie."""

    @property
    def storage(self) -> StorageRef | None:
        """The S3 service."""

    @property
    def hub(self) -> HubRef | None:
        """The hub."""


def canonical_json(value: object) -> str:
    """Return JSON that is equal for equal content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def build_train_run(
    spec: FineTuneJobSpec,
    *,
    name: str,
    namespace: str,
    attempt: int,
    storage: StorageSettings,
    hub: HubSettings | None = None,
) -> TrainRun:
    """Render the run document of one attempt; `hub` has the platform's defaults. `spec.model` has its address.

    `model_construct` keeps a document of a local run, whose local paths were accepted when the spec was parsed.
    """
    timeouts = spec.retry.timeouts if spec.retry else None
    resources = spec.resources or Resources()
    return TrainRun.model_construct(
        name=name,
        namespace=namespace,
        attempt=attempt,
        model=RunModel.model_construct(**dict(spec.model)),
        dataset=spec.dataset,
        objective=resolve_objective(spec),
        method=spec.method.type,
        lora=resolve_lora(spec),
        quantization=spec.method.quantization,
        prefix_tuning=resolve_prefix_tuning(spec),
        prompt_tuning=resolve_prompt_tuning(spec),
        ia3=resolve_ia3(spec),
        hyperparameters=resolve_hyperparameters(spec),
        evaluation=resolve_evaluation(spec),
        output_uri=spec.output.uri.rstrip("/"),
        storage=storage,
        hub=resolve_hub(spec, hub or HubSettings()),
        hub_output=spec.output.hub,
        merge=spec.output.merge,
        gpus=resources.gpus,
        nodes=resources.nodes,
        processes=resources.processes,
        parallelism=resources.parallelism,
        stall_seconds=seconds_of(timeouts.stall) if timeouts and timeouts.stall else None,
        tracking=spec.tracking,
    )


def resolve_storage(spec: HasPlaces, platform: StorageSettings) -> StorageSettings:
    """Lay the spec's storage block over the platform's defaults.

    Path style follows the endpoint where nobody says otherwise: S3 services of one's own rarely have a host name
    per bucket.
    """
    given = spec.storage
    if given is None:
        return platform
    endpoint = given.endpoint or platform.endpoint
    if given.path_style is not None:
        path_style = given.path_style
    else:
        path_style = platform.path_style if given.endpoint is None else True
    return StorageSettings(
        endpoint=endpoint,
        region=given.region or platform.region,
        path_style=path_style,
        secret_name=given.secret_name or platform.secret_name,
    )


def resolve_hub(spec: HasPlaces, platform: HubSettings) -> HubSettings:
    """Lay the spec's hub block over the platform's defaults.

    The platform's token goes to the platform's hub alone: whoever gets a token can act in its owner's name.
    """
    given = spec.hub
    if given is None:
        return platform
    endpoint = given.endpoint.rstrip("/") if given.endpoint is not None else platform.endpoint
    platform_secret = platform.secret_name if endpoint == platform.endpoint else None
    return HubSettings(endpoint=endpoint, secret_name=given.secret_name or platform_secret)


_SHAPING_FIELDS = (
    "model", "dataset", "objective", "method", "lora", "quantization", "prefixTuning", "promptTuning", "ia3",
    "hyperparameters", "evaluation", "merge",
)  # fmt: skip
_SCALING_FIELDS = ("nodes", "processes")
"""They shape the result by the global batch, and by which rows a process gets."""


def run_key(
    run: TrainRun,
    *,
    model_version: str,
    data_versions: Mapping[str, str],
    artifact_digests: Mapping[str, str] = MappingProxyType({}),
    function_digests: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Name a run by what determines its result.

    Args:
        run: The document; names, places, credentials and limits in it do not count.
        model_version: Commit of a hub model, or a digest over the ETags of a folder's files.
        data_versions: ETag and size of every data file, by URI.
        artifact_digests: Digest of every result of another run that goes in, by the URI that the document has for it.
        function_digests: Digest of the code of every reward function, by its name.

    Returns:
        The first 16 hex digits of a SHA-256.
    """
    document: dict[str, Any] = with_digests(run, artifact_digests).document()
    content = {
        "recipe": RECIPE_VERSION,
        "run": {field: document[field] for field in _SHAPING_FIELDS if field in document}
        # Only above 1: results of runs in one process stay findable by their keys.
        | {field: document[field] for field in _SCALING_FIELDS if document[field] > 1},
        "model": model_version,
        "data": dict(data_versions),
        **({"functions": dict(function_digests)} if function_digests else {}),
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]
