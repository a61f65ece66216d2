"""Shows the numbers of a run where people look for them: TensorBoard files, an MLflow server, offline runs of W&B.

The supervisor feeds this out of the worker's events, so the step loop has no part in it, every objective is served
alike, and the worker needs neither a network nor credentials.
"""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunewright_api.run_config import TrainRun
from tunewright_trainer.mlflow import MLflowClient, MLflowLog
from tunewright_trainer.protocol import EvaluationEvent, Event, StepEvent
from tunewright_trainer.tensorboard import EventFile
from tunewright_trainer.wandb import OfflineRun

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"


def scalars_of(event: Event) -> tuple[int, dict[str, float]]:
    """Return step and finite numbers of an event, named as in `train/loss`; none for events without numbers."""
    if isinstance(event, EvaluationEvent):
        given: dict[str, float | None] = {"loss": event.loss, **(event.metrics or {}), **(event.details or {})}
        return event.step, _named("eval", given)
    if isinstance(event, StepEvent):
        given = {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "epoch": event.epoch,
            "tokens_per_second": event.tokens_per_second,
            **(event.metrics or {}),
            **(event.details or {}),
        }
        return event.step, _named("train", given)
    return 0, {}


def _named(group: str, given: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in given.items() if value is not None and math.isfinite(value)}


def parameters_of(run: TrainRun) -> dict[str, str]:
    """Return what the run was asked to do as flat text, named as in `hyperparameters.learningRate`."""
    return dict(_flat(_shaping(run)))


def _shaping(run: TrainRun) -> dict[str, Any]:
    document = run.document()
    names = ("model", "objective", "method", "lora", "quantization", "hyperparameters", "evaluation")
    return {name: document[name] for name in names if name in document}


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}.{key}" if path else key)]
    return [(path, str(value))]


class Trackers:
    """What `tracking` of a run asks for; nothing where it asks for nothing."""

    def __init__(self, run: TrainRun, work: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Take what `start` needs."""
        self._run = run
        self._work = work
        self._environment = environment
        self._say = say
        self._files: EventFile | None = None
        self._mlflow: MLflowLog | None = None
        self._wandb: OfflineRun | None = None

    def start(self) -> None:
        """Start logging; nothing here waits for a network."""
        run, asked = self._run, self._run.tracking
        if asked is not None and asked.tensorboard:
            self._files = EventFile(self._work / TENSORBOARD_FOLDER, run.name, time.time())
        if asked is not None and asked.mlflow is not None:
            self._mlflow = MLflowLog(
                MLflowClient(asked.mlflow.uri, self._environment),
                experiment=asked.mlflow.experiment or run.namespace,
                name=run.name,
                tags={"tunewright.namespace": run.namespace, "tunewright.attempt": str(run.attempt)},
                parameters=parameters_of(run),
                say=self._say,
            )

        if asked is not None and asked.wandb is not None:
            self._wandb = OfflineRun(
                self._work / WANDB_FOLDER,
                uuid.uuid4().hex[:8],
                project=asked.wandb.project,
                entity=asked.wandb.entity,
                name=run.name,
                started=time.time(),
                config=_shaping(run),
            )

    def write(self, event: Event) -> None:
        """Take the numbers of an event."""
        step, numbers = scalars_of(event)
        if not numbers:
            return
        if self._files is not None:
            self._files.write(time.time(), step, numbers)
        if self._mlflow is not None:
            self._mlflow.write(step, numbers)
        if self._wandb is not None:
            self._wandb.write(time.time(), step, numbers)

    def add_files(self, output: Path) -> None:
        """Copy what is published into the output folder."""
        if self._wandb is not None:
            self._wandb.finish(time.time())
        for name, writer in ((TENSORBOARD_FOLDER, self._files), (WANDB_FOLDER, self._wandb)):
            if writer is not None:
                shutil.copytree(self._work / name, output / name, dirs_exist_ok=True)

    def close(self, *, finished: bool) -> None:
        """Say how the run ended to whom it may concern, within seconds."""
        if self._mlflow is not None:
            self._mlflow.close("FINISHED" if finished else "FAILED")
