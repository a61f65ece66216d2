"""What the trainer's steps say to the supervisor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunewright_trainer.errors import Diverged
from tunewright_trainer.protocol import EvaluationEvent, StageEvent, StepEvent

Report = Callable[[BaseModel], None]
TOKENISING_REPORT_SECONDS = 5.0
"""A third of the interval of the heartbeat, so that no line of the log is old news."""
_OWN_FIELDS = frozenset(
    {
        *("loss", "learning_rate", "grad_norm", "num_tokens", "num_input_tokens_seen", "epoch", "step"),
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
        tokens = int(logs.get("num_tokens", logs.get("num_input_tokens_seen", 0)))  # TRL's name, transformers' name
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


class TokenisingReport:
    """Report now and then how many rows of a file are tokenised: a sign of life, too, of a worker that has much to do
    before its first step. It is called with the bytes of each row."""

    def __init__(self, report: Report, path: Path, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the file, and what its rows are: "training" or "validation"."""
        self._report = report
        self._label = label
        self._clock = clock
        self._total = path.stat().st_size
        self._last = clock()
        self._bytes = 0
        self._rows = 0
        self._has_reported = False

    def __call__(self, size: int) -> None:
        """Take note of a row; of the last one it is said as well, if anything was said before."""
        self._bytes += size
        self._rows += 1
        due = self._clock() - self._last >= TOKENISING_REPORT_SECONDS
        if due or (self._has_reported and self._bytes == self._total):
            self._has_reported, self._last = True, self._clock()
            message = f"{self._rows:,} {self._label} rows tokenised"
            percent = round(100 * self._bytes / self._total, 1)
            self._report(StageEvent(stage="Loading", message=message, percent=percent))


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
