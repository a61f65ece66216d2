"""Progress as a fold over events, and what is said of it to people."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tunewright_api.run_report import Progress
from tunewright_trainer import events
from tunewright_trainer.events import HEARTBEAT_SECONDS, MAX_LINE_METRICS, Heartbeat, MetricsFile, describe, metrics_of
from tunewright_trainer.protocol import EvaluationEvent, PlanEvent, StageEvent, StepEvent
from tunewright_trainer.tracker import MAX_HISTORY, Tracker, now, thin


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.time


def plan(total: int) -> PlanEvent:
    """Build a plan event."""
    return PlanEvent(total_steps=total, dtype="float32", trainable_parameters=1, total_parameters=2, train_rows=3)


def test_steps_become_percent_loss_and_time_left() -> None:
    """The time left follows the speed since the first step: loading does not count."""
    clock = Clock()
    tracker = Tracker(clock)
    tracker.handle(StageEvent(stage="Loading"))
    tracker.handle(plan(10))
    clock.time += 1000
    tracker.handle(StepEvent(step=1, loss=2.0, epoch=0.1, learning_rate=0.1, tokens_per_second=50))
    assert tracker.progress.eta_seconds is None
    clock.time += 8
    tracker.handle(StepEvent(step=5, loss=1.5))
    progress = tracker.progress
    assert (progress.stage, progress.step, progress.percent, progress.eta_seconds) == ("Training", 5, 50.0, 10)
    assert (progress.loss, progress.learning_rate, progress.loss_history) == (1.5, 0.1, [(1, 2.0), (5, 1.5)])


def test_a_loss_that_is_no_number_stays_out() -> None:
    """NaN cannot stand in a status; the last real loss stays."""
    tracker = Tracker(Clock())
    tracker.handle(StepEvent(step=1, loss=2.0))
    tracker.handle(StepEvent(step=2, loss=math.nan, learning_rate=math.inf))
    assert (tracker.progress.step, tracker.progress.loss, tracker.progress.learning_rate) == (2, 2.0, None)
    Progress.model_validate_json(tracker.progress.model_dump_json(by_alias=True))


def test_the_history_stays_short() -> None:
    """However long the run, at most 64 points with the first and the last among them."""
    tracker = Tracker(Clock())
    for step in range(1, 2000):
        tracker.handle(StepEvent(step=step, loss=1.0 / step))
        history = tracker.progress.loss_history
        assert len(history) <= MAX_HISTORY
        assert (history[0][0], history[-1][0]) == (1, step)


@pytest.mark.parametrize("length", [1, 64, 65, 66])
def test_thinning_keeps_the_ends(length: int) -> None:
    """First and last point survive for odd and even lengths."""
    history = [(n, float(n)) for n in range(length)]
    kept = thin(history)
    assert (kept[0], kept[-1]) == (history[0], history[-1])
    assert len(kept) <= MAX_HISTORY


def test_evaluations_before_and_after() -> None:
    """Step 0 is the base model; the improvement is known with both."""
    tracker = Tracker(Clock())
    assert tracker.evaluation is None
    tracker.handle(EvaluationEvent(step=0, loss=3.0))
    assert tracker.evaluation is not None
    assert tracker.evaluation.document() == {"base": 3.0}
    assert tracker.progress.eval_loss is None
    tracker.handle(EvaluationEvent(step=10, loss=1.0))
    assert tracker.evaluation.document() == {"base": 3.0, "tuned": 1.0, "improvement": 2.0}
    assert tracker.progress.eval_loss == 1.0


def test_bytes_become_percent() -> None:
    """Transfers move the percentage; a part that starts over moves it back; it stays within its bounds."""
    seen: list[float] = []
    tracker = Tracker(Clock(), lambda progress: seen.append(progress.percent))
    tracker.enter("Fetching", "x" * 5000, total_bytes=200)
    for size in (50, 100, -100, 150, 50):
        tracker.advance("Fetching", size)
    assert seen == [0.0, 25.0, 75.0, 25.0, 100.0]
    assert len(tracker.progress.message or "") == 1024


def test_bytes_of_a_later_stage_wait_for_it() -> None:
    """Rows are checked while a model is still fetched: fetching shows nothing of it, and checking all of it."""
    tracker = Tracker(Clock())
    tracker.enter("Fetching", total_bytes=200)
    tracker.advance("Checking", 50)
    assert tracker.progress.percent == 0.0
    tracker.enter("Checking", total_bytes=100)
    tracker.advance("Checking", 10)
    assert tracker.progress.percent == 60.0


def test_a_stage_of_the_worker_may_have_a_percentage() -> None:
    """What the worker says of a long stage is shown, and a stage without a percentage starts at 0."""
    tracker = Tracker(Clock())
    tracker.handle(StageEvent(stage="Loading", message="500 training rows tokenised", percent=37.5))
    assert describe(tracker.progress) == "Loading  38 %  500 training rows tokenised"
    tracker.handle(StageEvent(stage="Training"))
    assert (tracker.progress.percent, tracker.progress.message) == (0.0, None)


def test_a_heartbeat_now_and_then() -> None:
    """One line per stage, then one per interval: a log of a long run stays readable."""
    clock = Clock()
    lines: list[str] = []
    heartbeat = Heartbeat(lines.append, clock)
    for step in range(1, 61):
        heartbeat.see(Progress(stage="Training", step=step, total_steps=60, updated_at=now()))
        clock.time += 1
    heartbeat.see(Progress(stage="Publishing", updated_at=now()))
    assert len(lines) == 60 / HEARTBEAT_SECONDS + 1


def test_the_line_for_people() -> None:
    """A line says what a person asks first: how far, how good, how long."""
    progress = Progress(
        stage="Training", step=120, total_steps=300, percent=40, loss=1.23456, tokens_per_second=99.6, eta_seconds=130,
        updated_at=now(),
    )  # fmt: skip
    assert describe(progress) == "Training  step 120/300  40 %  loss 1.2346  100 tokens/s  2m10s left"


def test_metrics_lines() -> None:
    """Logged steps and evaluations have a line; a number that is not finite is null."""
    assert metrics_of(StepEvent(step=1)) is None
    assert metrics_of(StageEvent(stage="Loading")) is None
    assert metrics_of(StepEvent(step=1, loss=math.nan, grad_norm=2.0)) == {"step": 1, "loss": None, "gradNorm": 2.0}
    assert metrics_of(EvaluationEvent(step=0, loss=1.0)) == {"step": 0, "evalLoss": 1.0}


def test_everything_that_is_measured_is_kept() -> None:
    """A line has what the status shows and what it has no room for, at most 64 numbers, in steps and evaluations."""
    step = StepEvent(
        step=1, loss=0.5, metrics={"rewards/margins": 0.25}, details={"logps/chosen": -3.5, "odd": math.inf}
    )
    measured = {"rewards/margins": 0.25, "logps/chosen": -3.5, "odd": None}
    assert metrics_of(step) == {"step": 1, "loss": 0.5, "metrics": measured}
    evaluation = EvaluationEvent(step=2, loss=0.5, metrics={"accuracy": 0.75})
    assert metrics_of(evaluation) == {"step": 2, "evalLoss": 0.5, "metrics": {"accuracy": 0.75}}
    many = metrics_of(StepEvent(step=1, loss=0.5, metrics={f"{n}{'x' * 300}": 1.0 for n in range(100)}))
    assert many is not None
    assert len(many["metrics"]) == MAX_LINE_METRICS
    assert len(json.dumps(many)) < 10_000


def test_a_long_run_keeps_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the size at which nobody reads details, a line still has the loss."""
    monkeypatch.setattr(events, "MAX_DETAILED_BYTES", 500)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for number in range(20):
        file.write(StepEvent(step=number, loss=0.5, metrics={"reward": 1.0}))
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20))
    assert [line["loss"] for line in lines] == [0.5] * 20
    detailed = ["metrics" in line for line in lines]
    assert detailed == sorted(detailed, reverse=True)
    assert 0 < sum(detailed) < 20
