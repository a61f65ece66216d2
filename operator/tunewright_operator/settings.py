"""Settings of the operator, read from the environment: `TUNEWRIGHT_` and the field's name in capitals."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tunewright_api.base import ObjectName, Quantity
from tunewright_api.run_config import HubSettings, StorageSettings


class Settings(BaseSettings):
    """All settings; each says what it is, its unit and why its default is what it is."""

    model_config = SettingsConfigDict(env_prefix="TUNEWRIGHT_", frozen=True, env_ignore_empty=True)

    watch_namespaces: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Namespaces to serve, comma-separated. Empty: all, which needs a ClusterRole."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged; info says every transition once."
    )
    port: int = Field(
        default=8080,
        ge=0,
        le=65535,
        description="Port of /healthz, /readyz and /metrics: one, so that one NetworkPolicy rule is enough. "
        "0 takes a free one (tests).",
    )

    trainer_image: str = Field(
        default=f"tunewright/trainer:{version('tunewright')}",
        min_length=1,
        description="Image of pods whose spec names none; by default of the operator's own version, because the two "
        "share the run document.",
    )
    trainer_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="Pull policy of that image: it has several GB."
    )
    default_cpu: Quantity = Field(
        default="2", description="CPU request without one in the spec; tokenising and uploads use two cores."
    )
    default_memory: Quantity = Field(
        default="16Gi", description="Memory request and limit without one in the spec: enough for 7B under QLoRA."
    )
    default_ephemeral_storage: Quantity = Field(
        default="50Gi", description="Disk request and limit without one in the spec: a 7B model twice, and data."
    )
    default_shared_memory: Quantity = Field(
        default="1Gi", description="Size of /dev/shm without one in the spec: what the data loader's workers share."
    )

    default_merge_cpu: Quantity = Field(
        default="2", description="CPU request of a merge without one in the spec: one computes, one transfers."
    )
    default_merge_memory: Quantity = Field(
        default="4Gi",
        description="Memory request and limit of a merge without one in the spec: tensors stream through it, and the "
        "check of the logits holds a layer of base and merged model at a time.",
    )
    default_merge_ephemeral_storage: Quantity = Field(
        default="50Gi",
        description="Disk request and limit of a merge without one in the spec: models from the Hub and GGUF files "
        "pass through it.",
    )

    storage_endpoint: str | None = Field(default=None, description="URL of the S3 service. Default: AWS.")
    storage_region: str = Field(default="us-east-1", description="Region of the S3 service; AWS's own default.")
    storage_path_style: bool = Field(
        default=False, description="Bucket in the path, not in the host name; AWS wants the latter."
    )
    storage_secret_name: ObjectName | None = Field(
        default=None,
        description="Secret with S3 credentials in the workload's namespace, used where its spec names none. "
        "Default: the pod's own cloud identity.",
    )

    hub_endpoint: str | None = Field(default=None, description="URL of the hub. Default: https://huggingface.co.")
    hub_secret_name: ObjectName | None = Field(
        default=None,
        description="Secret with a Hub token (key `token`) in the workload's namespace, used where a spec that uses "
        "the platform's hub names none. Default: none; it may be missing: public models need no token.",
    )

    concurrency: int = Field(
        default=16,
        ge=1,
        le=256,
        description="Workloads reconciled at once; 16 requests in flight keep a small API server busy.",
    )
    resync_seconds: float = Field(
        default=600,
        gt=0,
        description="Seconds between full lists that repair whatever a watch may have missed.",
    )
    progress_interval_seconds: float = Field(
        default=15,
        gt=0,
        description="Seconds between two looks at a running pod's progress, each of which is a status write: spares "
        "etcd, and people hardly look more often.",
    )
    backoff_seconds: float = Field(
        default=10, gt=0, description="Wait before the first restart, in seconds; doubles with each further one."
    )
    config_error_grace_seconds: float = Field(
        default=60,
        ge=0,
        description="Seconds after which a pod that cannot start (missing Secret, invalid image name) fails the run: "
        "an object applied in the same go may come a little later.",
    )
    image_pull_grace_seconds: float = Field(
        default=900,
        ge=0,
        description="Seconds after which a pod whose image cannot be pulled fails the run: it holds a GPU, but a "
        "registry may be away for minutes.",
    )
    node_lost_grace_seconds: float = Field(
        default=60,
        ge=0,
        description="Seconds past a deleted pod's grace period after which its node is taken for lost.",
    )

    @field_validator("watch_namespaces", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @property
    def storage(self) -> StorageSettings:
        """The platform's storage defaults, as the run document carries them."""
        return StorageSettings(
            endpoint=self.storage_endpoint,
            region=self.storage_region,
            path_style=self.storage_path_style,
            secret_name=self.storage_secret_name,
        )

    @property
    def hub(self) -> HubSettings:
        """The platform's hub defaults, as the run document carries them."""
        endpoint = self.hub_endpoint.rstrip("/") if self.hub_endpoint is not None else None
        return HubSettings(endpoint=endpoint, secret_name=self.hub_secret_name)
