"""Folds what happens into the Progress that the world sees. No I/O besides the clock that it is given."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from tunewright_api.run_report import MAX_METRICS, EvaluationResult, Progress, RunPlan, Stage
from tunewright_trainer.dataset import PreparedData
from tunewright_trainer.protocol import (
    BestEvent,
    EarlyStopEvent,
    EvaluationEvent,
    Event,
    PlanEvent,
    StageEvent,
    StepEvent,
)

MAX_HISTORY = 64
MAX_MESSAGE = 1024


def finite(value: float | None) -> float | None:
    """Return the number, or None where it is not one that JSON and the status can hold."""
    return value if value is not None and isfinite(value) else None


def shown(metrics: dict[str, float] | None) -> dict[str, float] | None:
    """Return metrics as people read them: rounded, as many as a status holds; metrics.jsonl has them all."""
    if metrics is None:
        return None
    return {name[:64]: round(value, 4) for name, value in list(metrics.items())[:MAX_METRICS]}


def thin(history: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Halve a history that has grown over `MAX_HISTORY` points; first and last stay."""
    if len(history) <= MAX_HISTORY:
        return history
    kept = history[::2]
    return kept if kept[-1] == history[-1] else [*kept, history[-1]]


class Tracker:
    """The state of a run as `Progress`. Safe to use from several threads."""

    def __init__(self, monotonic: Callable[[], float], on_change: Callable[[Progress], None] | None = None) -> None:
        """Begin at stage Starting.

        Args:
            monotonic: Clock in seconds, for rates.
            on_change: Called with every new state, from the thread that made it.
        """
        self._lock = threading.Lock()
        self._monotonic = monotonic
        self._on_change = on_change
        self._progress = Progress(stage="Starting", updated_at=now())
        self._bytes_done: Counter[Stage] = Counter()
        self._bytes_total = 0
        self._first_step: tuple[int, float] | None = None
        self._base_loss: float | None = None
        self._base_metrics: dict[str, float] | None = None
        self._tuned_metrics: dict[str, float] | None = None
        self._best_step: int | None = None
        self.early_stop: str | None = None
        self.plan = RunPlan()

    @property
    def progress(self) -> Progress:
        """The newest state."""
        with self._lock:
            return self._progress

    @property
    def evaluation(self) -> EvaluationResult | None:
        """Loss before and after, as far as it is known; None without any evaluation."""
        base, tuned = self._base_loss, self.progress.eval_loss
        if base is None and tuned is None:
            return None
        improvement = base - tuned if base is not None and tuned is not None else None
        return EvaluationResult(
            base=base,
            tuned=tuned,
            improvement=improvement,
            best_step=self._best_step,
            base_metrics=self._base_metrics,
            tuned_metrics=self._tuned_metrics,
        )

    def enter(
        self, stage: Stage, message: str | None = None, total_bytes: int = 0, percent: float | None = None
    ) -> None:
        """Begin a stage, or say how far it is; with `total_bytes` its percentage follows `advance`."""
        with self._lock:
            self._bytes_total = total_bytes
        share = percent if percent is not None else 100.0 if stage == "Finished" else 0.0
        self._set(stage=stage, message=message, percent=share, eta_seconds=None)

    def tell(self, message: str) -> None:
        """Say what the stage does right now."""
        self._set(message=message)

    def advance(self, stage: Stage, size: int) -> None:
        """Take note of bytes that went through for a stage; what comes before the stage is shown once it has begun."""
        with self._lock:
            self._bytes_done[stage] += size
            if stage != self._progress.stage:
                return
            share = 100 * self._bytes_done[stage] / self._bytes_total if self._bytes_total else 0.0
            percent = round(min(100.0, max(0.0, share)), 1)
            if percent == self._progress.percent:
                return
        self._set(percent=percent)

    def checked(self, data: PreparedData, continued_from: str | None = None) -> None:
        """Take note of the checked data set, and of the adapter that training goes on from."""
        self.plan = RunPlan(
            train_rows=data.train_rows,
            validation_rows=data.validation_rows,
            data_format=data.format.name,
            continued_from=continued_from,
        )

    def handle(self, event: Event) -> None:
        """Take note of an event of the worker."""
        match event:
            case StageEvent():
                self.enter(event.stage, event.message, percent=event.percent)
            case PlanEvent():
                self._handle_plan(event)
            case StepEvent():
                self._handle_step(event)
            case EvaluationEvent():
                self._handle_evaluation(event)
            case EarlyStopEvent():
                self.early_stop = event.message
            case BestEvent():
                self._best_step = event.step
                self._tuned_metrics = shown(event.metrics)
                self._set(eval_loss=finite(event.loss))

    def _handle_plan(self, event: PlanEvent) -> None:
        modules = event.target_modules[:MAX_HISTORY] if event.target_modules else None
        self.plan = self.plan.model_copy(
            update={
                "total_steps": event.total_steps,
                "train_rows": event.train_rows,
                "dropped_rows": event.dropped_rows,
                "cut_rows": event.cut_rows,
                "dtype": event.dtype,
                "trainable_parameters": event.trainable_parameters,
                "total_parameters": event.total_parameters,
                "target_modules": modules,
                "parallelism": event.parallelism,
            }
        )
        self._set(total_steps=event.total_steps)

    def _handle_step(self, event: StepEvent) -> None:
        old = self.progress
        changes: dict[str, Any] = {"step": event.step, "stage": "Training"}
        given = {
            "epoch": (event.epoch, 3),
            "loss": (event.loss, 4),
            "learning_rate": (event.learning_rate, 10),
            "tokens_per_second": (event.tokens_per_second, 1),
        }
        # Rounded for people (these numbers are columns of `kubectl get`); metrics.jsonl keeps all digits.
        changes |= {name: round(v, digits) for name, (v, digits) in given.items() if v is not None and isfinite(v)}
        if event.metrics:
            changes["metrics"] = shown(event.metrics)
        if "loss" in changes:
            changes["loss_history"] = thin([*old.loss_history, (event.step, changes["loss"])])
        if old.total_steps:
            changes["percent"] = round(min(100.0, 100 * event.step / old.total_steps), 1)
            changes["eta_seconds"] = self._eta(event.step, old.total_steps)
        self._set(**changes)

    def _eta(self, step: int, total: int) -> int | None:
        time = self._monotonic()
        if self._first_step is None:
            self._first_step = (step, time)
        first, started = self._first_step
        if step <= first:
            return None
        return max(0, round((total - step) * (time - started) / (step - first)))

    def _handle_evaluation(self, event: EvaluationEvent) -> None:
        loss = finite(event.loss)
        if event.step == 0:
            self._base_loss, self._base_metrics = loss, shown(event.metrics)
        else:
            self._tuned_metrics = shown(event.metrics)
            self._set(eval_loss=loss)

    def _set(self, **changes: Any) -> None:
        message = changes.get("message")
        if message is not None:
            changes["message"] = message[:MAX_MESSAGE]
        with self._lock:
            self._progress = self._progress.model_copy(update={**changes, "updated_at": now()})
            progress = self._progress
        if self._on_change is not None:
            self._on_change(progress)


def now() -> str:
    """Return the time as RFC 3339 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
