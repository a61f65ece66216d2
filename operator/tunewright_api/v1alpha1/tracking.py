"""Where the numbers of a run are shown besides status and metrics.jsonl."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright_api.base import ObjectName, SpecModel


class MLflow(SpecModel):
    """An MLflow tracking server."""

    uri: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._~/-]*)?$", max_length=512)] = Field(
        description="URL of the server, as in MLFLOW_TRACKING_URI."
    )
    experiment: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None,
        description="Experiment that the run belongs to; made if it is missing. Default: the namespace.",
    )
    secret_name: ObjectName | None = Field(
        default=None,
        description="Secret in the same namespace with MLFLOW_TRACKING_TOKEN, or with MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD. Left out: the server asks for nothing.",
    )


class Wandb(SpecModel):
    """A run of Weights & Biases, written offline: the training pod talks to no server of W&B."""

    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_. -]+$", max_length=128)] = Field(
        description="Project that the run belongs to once it is sent."
    )
    entity: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=128)] | None = Field(
        default=None, description="User or team that the project belongs to. Default: whoever sends the run."
    )


class Tracking(SpecModel):
    """Where the numbers of a run are shown besides status and metrics.jsonl. It does not take part in the run key."""

    tensorboard: bool = Field(
        default=False, description="Publish TensorBoard event files with the result, in its folder tensorboard/."
    )
    mlflow: MLflow | None = Field(
        default=None, description="Log to an MLflow server. One that does not answer never slows or fails the run."
    )
    wandb: Wandb | None = Field(
        default=None,
        description="Publish an offline run of Weights & Biases with the result, in its folder wandb/; `wandb sync` "
        "sends it.",
    )
