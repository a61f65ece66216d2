"""What the trainer's steps say to the supervisor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunewright_trainer.errors import Diverged
from tunewright_trainer.protocol import EvaluationEvent, StageEvent, StepEvent

Report = Callable[[BaseModel], None]


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
        tokens = int(logs["num_tokens"])
        self._report(
            StepEvent(
                step=state.global_step,
                epoch=state.epoch,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                tokens=tokens,
                tokens_per_second=(tokens - self._tokens) / seconds if seconds > 0 else None,
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
        loss: float = context["metrics"]["eval_loss"]
        self._report(EvaluationEvent(step=state.global_step, loss=loss))
        check_loss(loss, f"evaluation loss at step {state.global_step}")
        if 0 < state.global_step < state.max_steps:
            self._report(StageEvent(stage="Training"))


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
