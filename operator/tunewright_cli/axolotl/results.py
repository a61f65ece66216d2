"""Where results and numbers go besides output.uri: the Hub, TensorBoard files, MLflow, W&B."""

from __future__ import annotations

import re

from tunewright_cli.axolotl.draft import Draft, Kind


def convert_results(draft: Draft) -> None:
    """Set output.hub and tracking."""
    _hub(draft)
    _mlflow(draft)
    _wandb(draft)
    if draft.take_flag("use_tensorboard"):
        draft.set("tracking.tensorboard", True, "use_tensorboard")


def _hub(draft: Draft) -> None:
    repository, branch = draft.take_text("hub_model_id"), draft.take_text("hub_revision")
    strategy = draft.take_text("hub_strategy")
    if repository is None:
        for key, value in (("hub_revision", branch), ("hub_strategy", strategy)):
            if value is not None:
                draft.note(Kind.NOT_NEEDED, key, "hub_model_id names no repository")
        return
    draft.set("output.hub.repository", repository, "hub_model_id")
    draft.set("output.hub.revision", branch, "hub_revision")
    text = "put a token that may write there into a Secret, and name it in hub.secretName where the platform has none"
    draft.note(Kind.TO_DO, "hub_model_id", text)
    if strategy not in (None, "end"):
        draft.note(Kind.NOT_CONVERTED, "hub_strategy", "the result is pushed once, at the end")


def _mlflow(draft: Draft) -> None:
    asked, uri = draft.take_flag("use_mlflow"), draft.take_text("mlflow_tracking_uri")
    experiment = draft.take_text("mlflow_experiment_name")
    keys = [
        key for key in ("use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name") if draft.value(key) is not None
    ]
    if asked is False:
        for key in keys:
            draft.note(Kind.NOT_NEEDED, key, "MLflow is switched off")
    elif uri is not None and re.match("https?://", uri):
        draft.set("tracking.mlflow.uri", uri, "mlflow_tracking_uri")
        draft.set("tracking.mlflow.experiment", experiment, "mlflow_experiment_name")
    else:
        for key in keys:
            text = "no server is named that a pod can reach: set tracking.mlflow.uri, and its experiment beside it"
            draft.note(Kind.NOT_CONVERTED, key, text)


def _wandb(draft: Draft) -> None:
    asked, project = draft.take_flag("use_wandb"), draft.take_text("wandb_project")
    entity, mode = draft.take_text("wandb_entity"), draft.take_text("wandb_mode")
    keys = [key for key in ("use_wandb", "wandb_project", "wandb_entity", "wandb_mode") if draft.value(key) is not None]
    if asked is False or mode == "disabled":
        for key in keys:
            draft.note(Kind.NOT_NEEDED, key, "W&B is switched off")
    elif project is None:
        for key in keys:
            draft.note(Kind.NOT_CONVERTED, key, "no project is named: set tracking.wandb.project")
    else:
        draft.set("tracking.wandb.project", project, "wandb_project")
        draft.set("tracking.wandb.entity", entity, "wandb_entity")
        if mode != "offline":
            draft.note(
                Kind.DIFFERS, "wandb_project", "an offline run is published with the result: send it by wandb sync"
            )
