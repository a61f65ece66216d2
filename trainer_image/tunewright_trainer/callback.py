"""What the trainer's steps say to the supervisor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunewright_trainer.errors import Diverged
from tunewright_trainer.protocol import EvaluationEvent, StageEvent, StepEvent

Report = Callable[[BaseModel], None]
_OWN_FIELDS = frozenset(
    {
        *("loss", "learning_rate", "grad_norm", "num_tokens", "epoch", "step"),
        *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),
    }
)
"""Logged numbers that have a field of their own, or say how fast an evaluation was."""


class ProgressCallback(TrainerCallback):
    """Report every optimizer step and every evaluation, and end a run whose loss is no number.

    A report is one appended line, some tens of microseconds (bench/trainer), so it needs no thread of its own.
    """

    def __init__(self, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._began = 0.0
        self._tokens = 0
        self._evaluating = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the step's clock."""
        self._began = self._clock()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report a step. Evaluations and the end of training log as well; only a step's log has a `loss`.

        Raises:
            Diverged: The loss is NaN or infinite.
        """
        if logs is None or "loss" not in logs:
            return
        seconds = self._clock() - self._began
        tokens = int(logs.get("num_tokens", 0))
        self._report(
            StepEvent(
                step=state.global_step,
                epoch=state.epoch,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                tokens=tokens or None,
                tokens_per_second=(tokens - self._tokens) / seconds if tokens and seconds > 0 else None,
                metrics=further(logs),
            )
        )
        self._tokens = tokens
        check_loss(logs["loss"], f"training loss at step {state.global_step}")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say once per evaluation that it has begun."""
        if not self._evaluating:
            self._evaluating = True
            self._report(StageEvent(stage="Evaluating"))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Report an evaluation.

        Raises:
            Diverged: The loss is NaN or infinite.
        """
        self._evaluating = False
        metrics: dict[str, float] = context["metrics"]
        loss = metrics["eval_loss"]
        named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        self._report(EvaluationEvent(step=state.global_step, loss=loss, metrics=further(named)))
        check_loss(loss, f"evaluation loss at step {state.global_step}")
        if 0 < state.global_step < state.max_steps:
            self._report(StageEvent(stage="Training"))


def further(logs: Mapping[str, float]) -> dict[str, float] | None:
    """Return what a recipe logs besides loss and speed: rewards, margins, accuracy."""
    found = {name: float(value) for name, value in logs.items() if name not in _OWN_FIELDS}
    return {name: value for name, value in found.items() if math.isfinite(value)} or None


def check_loss(loss: float, what: str) -> None:
    """Refuse a loss that is no number.

    Raises:
        Diverged: Saying what it is and what helps.
    """
    if not math.isfinite(loss):
        raise Diverged(
            f"the {what} is {loss}: lower hyperparameters.learningRate, raise warmupRatio, lower maxGradNorm, "
            "or set model.dtype to Float32"
        )
