"""Reads what the worker says, keeps the numbers in metrics.jsonl, and tells people now and then."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunewright_api.run_report import Progress
from tunewright_trainer.errors import InternalError
from tunewright_trainer.protocol import EVENTS_FILE, EvaluationEvent, Event, StepEvent, parse_event
from tunewright_trainer.tracker import finite, now

HEARTBEAT_SECONDS = 15.0
MAX_LINE_METRICS = 64
"""The recipes measure up to forty; each name takes at most `MAX_NAME_CHARACTERS`."""
MAX_NAME_CHARACTERS = 128
MAX_DETAILED_BYTES = 32 * 1024 * 1024
"""Some twenty thousand steps of GRPO, which measures most."""


class EventTail:
    """Reads events.jsonl as it grows."""

    def __init__(self, work: Path) -> None:
        self._path = work / EVENTS_FILE
        self._offset = 0

    def read(self) -> list[Event]:
        """Return the events that were completed since the last call.

        Raises:
            InternalError: A line is no event.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        try:
            return [parse_event(line) for line in whole.decode().splitlines()]
        except ValueError as error:
            raise InternalError(f"the training process wrote an event that cannot be read: {error}") from None


class MetricsFile:
    """metrics.jsonl: one line per logged step and per evaluation; from `MAX_DETAILED_BYTES` on without `metrics`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def write(self, event: Event) -> None:
        """Append the numbers of an event, if it has any."""
        values = metrics_of(event)
        if values is None:
            return
        with self.path.open("a") as file:
            if file.tell() > MAX_DETAILED_BYTES:
                values.pop("metrics", None)
            file.write(json.dumps({**values, "time": now()}) + "\n")


def metrics_of(event: Event) -> dict[str, Any] | None:
    """Return the line of metrics.jsonl for an event; a number that is not finite is null, as JSON has no other word.

    What the recipe measures besides is in `metrics`: at most `MAX_LINE_METRICS` numbers.
    """
    if not isinstance(event, EvaluationEvent | StepEvent):
        return None
    line = _own_numbers(event)
    further = {**(event.metrics or {}), **(event.details or {})}
    if line is not None and further:
        named = list(further.items())[:MAX_LINE_METRICS]
        line["metrics"] = {name[:MAX_NAME_CHARACTERS]: finite(value) for name, value in named}
    return line


def _own_numbers(event: EvaluationEvent | StepEvent) -> dict[str, Any] | None:
    if isinstance(event, EvaluationEvent):
        return {"step": event.step, "evalLoss": finite(event.loss)}
    if event.loss is None:
        return None
    given = {
        "step": event.step,
        "epoch": event.epoch,
        "loss": event.loss,
        "learningRate": event.learning_rate,
        "gradNorm": event.grad_norm,
        "tokens": event.tokens,
        "tokensPerSecond": event.tokens_per_second,
    }
    return {name: finite(value) for name, value in given.items() if value is not None}


class Heartbeat:
    """Writes a line for people at every new stage, and every `HEARTBEAT_SECONDS` within one."""

    def __init__(self, say: Callable[[str], None], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._monotonic = monotonic
        self._stage: str | None = None
        self._last = 0.0

    def see(self, progress: Progress) -> None:
        """Take note of a state, and say it when it is time."""
        moment = self._monotonic()
        if progress.stage == self._stage and moment - self._last < HEARTBEAT_SECONDS:
            return
        self._stage, self._last = progress.stage, moment
        self._say(describe(progress))


def describe(progress: Progress) -> str:
    """Return the state as one line for people."""
    parts: list[str] = [progress.stage]
    if progress.stage == "Training" and progress.step:
        parts.append(f"step {progress.step}" + (f"/{progress.total_steps}" if progress.total_steps else ""))
    if progress.percent and progress.stage != "Finished":
        parts.append(f"{progress.percent:.0f} %")
    if progress.stage == "Training":
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if progress.tokens_per_second is not None:
            parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
        if progress.eta_seconds is not None:
            parts.append(f"{progress.eta_seconds // 60}m{progress.eta_seconds % 60:02d}s left")
    if progress.message:
        parts.append(progress.message)
    return "  ".join(parts)
