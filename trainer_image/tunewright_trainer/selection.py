"""What evaluations decide while training goes on: which weights are the result, and whether to go on at all.

transformers can do both by saving checkpoints and loading the best one again. Here the trained weights alone (for an
adapter a few megabytes) are copied to one file, and copied back bit by bit: nothing of a quantized base is written, no
adapter is built anew, and the same few lines serve every method and objective.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunewright_api.defaults import ResolvedEvaluation
from tunewright_api.v1alpha1.parts import Metric
from tunewright_trainer.callback import Report, further
from tunewright_trainer.errors import DiskFull
from tunewright_trainer.protocol import BestEvent, EarlyStopEvent
from tunewright_trainer.sharding import is_sharded, let_go, local

_KEYS: dict[Metric, str] = {"Loss": "eval_loss", "Accuracy": "eval_accuracy", "F1": "eval_f1"}


@dataclass(frozen=True)
class Evaluated:
    """One evaluation. `score` is higher for the better model, whatever the metric."""

    step: int
    score: float
    metrics: dict[str, float]


class Selection(TrainerCallback):
    """Keep the weights of the best evaluation, and end a training that gets no better.

    The base model's evaluation is no candidate: what was asked for is a trained model.
    """

    def __init__(self, evaluation: ResolvedEvaluation, folder: Path, report: Report) -> None:
        """Take what to go by, and a folder that lives as long as the training."""
        assert evaluation.metric is not None, "resolve_evaluation fills it"
        self._metric = evaluation.metric
        self._loads_best = evaluation.load_best is True
        self._stopping = evaluation.early_stopping
        self._folder = folder
        self._report = report
        self._waited = 0
        self._reference: float | None = None
        self.best: Evaluated | None = None
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Look for room before hours of training are spent.

        Raises:
            DiskFull: The best weights would not fit.
        """
        needed = sum(weight.nbytes for weight in trained_weights(context["model"]).values())
        if is_sharded(context["model"]):
            needed *= int(os.environ["LOCAL_WORLD_SIZE"])
        free = shutil.disk_usage(self._folder).free
        if self._loads_best and free < needed:
            raise DiskFull(
                f"evaluation.loadBest keeps a copy of the trained weights, {needed / 1e9:.1f} GB, but only "
                f"{free / 1e9:.1f} GB are free: raise resources.ephemeralStorage"
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Compare an evaluation with those before it."""
        metrics: dict[str, float] = context["metrics"]
        value = metrics[_KEYS[self._metric]]
        now = Evaluated(state.global_step, -value if self._metric == "Loss" else value, metrics)
        if self.best is None or now.score > self.best.score:
            self.best = now
            if self._loads_best:
                self._keep(context["model"], args)
        if self._stopping is None:
            return
        # Many steps, each smaller than minDelta, may add up to an improvement: the reference moves only with one.
        if self._reference is None or now.score > self._reference + self._stopping.min_delta:
            self._reference, self._waited = now.score, 0
            return
        self._waited += 1
        if self._waited >= self._stopping.patience and state.global_step < state.max_steps and not self.stopped:
            self.stopped = True
            control.should_training_stop = True
            self._report(EarlyStopEvent(step=state.global_step, message=self._why(state)))

    def finish(self, trainer: Trainer) -> None:
        """After the training: give the model the best weights, and say which step they are of."""
        if not self._loads_best:
            return
        if not is_last_step_evaluated(trainer):
            trainer.evaluate()
        assert self.best is not None, "the last step was evaluated"
        if self.best.step != trainer.state.global_step:
            model = cast("nn.Module", trainer.model)
            load(model, self._path(model, trainer.args))
        named = {name.removeprefix("eval_"): value for name, value in self.best.metrics.items()}
        loss = self.best.metrics["eval_loss"]
        self._report(BestEvent(step=self.best.step, loss=loss, metrics=further(named)))

    def _keep(self, model: nn.Module, args: TrainingArguments) -> None:
        # All processes have the same weights, unless each has its own share of them; those of a pod share its disk.
        if args.local_process_index == 0 or is_sharded(model):
            torch.save(trained_weights(model), self._path(model, args))

    def _path(self, model: nn.Module, args: TrainingArguments) -> Path:
        return self._folder / f"best-{args.local_process_index if is_sharded(model) else 0}.pt"

    def _why(self, state: TrainerState) -> str:
        assert self._stopping is not None
        assert self.best is not None
        of = "loss" if self._metric == "Loss" else self._metric.lower()
        best = abs(self.best.score)
        return (
            f"stopped early at step {state.global_step} of {state.max_steps}: the evaluation {of} got no better by "
            f"more than {self._stopping.min_delta:g} in {self._waited} evaluations; its best was {best:.4f} at step "
            f"{self.best.step}"
        )


def is_last_step_evaluated(trainer: Trainer) -> bool:
    """Tell whether there was an evaluation after the last step."""
    return any("eval_loss" in log and log["step"] == trainer.state.global_step for log in trainer.state.log_history)


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that training changes, by name; shared ones once, of sharded ones this process's share."""
    let_go(model)
    return {name: local(weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def load(model: nn.Module, path: Path) -> None:
    """Copy weights back into the model that they were saved from."""
    saved: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for name, weight in trained_weights(model).items():
        weight.copy_(saved[name])
