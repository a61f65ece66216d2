"""The worker as the supervisor starts it: task in, events and exit code out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import EXCHANGES, MakeTask
from tunewright_api.exit_codes import ExitCode
from tunewright_trainer import sft, worker
from tunewright_trainer.protocol import EVENTS_FILE, ErrorEvent, Event, ResultEvent, WorkerTask, parse_event, write_task

pytestmark = pytest.mark.timeout(400)


def run_worker(work: Path, task: WorkerTask) -> tuple[int, list[Event], str]:
    """Start a worker, give it a task, and return its exit code, events and log."""
    command = [sys.executable, "-m", "tunewright_trainer.worker", "--work", str(work)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    write_task(work, task)
    log, _ = process.communicate()
    lines = (work / EVENTS_FILE).read_text().splitlines()
    return process.returncode, [parse_event(line) for line in lines], log


def test_worker_trains_what_the_task_says(make_task: MakeTask, tmp_path: Path) -> None:
    """The process takes the task, ends with 0, and its last event is the result."""
    task = make_task(validation=EXCHANGES[:4], hyperparameters={"maxSteps": 2}, model={"uri": "hf://tests/tiny"})
    code, events, log = run_worker(tmp_path, task)
    assert code == 0, log
    result = events[-1]
    assert isinstance(result, ResultEvent)
    assert result.steps == 2
    assert result.peak_memory_bytes > 100_000_000
    assert {"python", "torch", "transformers", "trl", "peft", "tunewright"} <= set(result.versions)
    assert (task.output_path / "adapter" / "adapter_model.safetensors").exists()


def test_worker_refuses_what_cannot_work(make_task: MakeTask, tmp_path: Path) -> None:
    """Invalid input ends with its exit code and an event that names reason and remedy."""
    task = make_task(model={"uri": "hf://tests/tiny", "dtype": "Float16"})
    code, events, _ = run_worker(tmp_path, task)
    assert code == ExitCode.INVALID_INPUT
    error = events[-1]
    assert isinstance(error, ErrorEvent)
    assert (error.exit_code, error.reason) == (ExitCode.INVALID_INPUT, "InvalidConfiguration")
    assert error.message.startswith("model.dtype is Float16, which needs a GPU")


def test_worker_reports_what_nobody_foresaw(make_task: MakeTask, tmp_path: Path) -> None:
    """An unforeseen error ends with 1, one line in the event, and the traceback in the log."""
    task = make_task().model_copy(update={"train_path": tmp_path / "gone.jsonl"})
    code, events, log = run_worker(tmp_path, task)
    assert code == ExitCode.INTERNAL_ERROR
    error = events[-1]
    assert isinstance(error, ErrorEvent)
    assert error.reason == "InternalError"
    assert error.message.startswith("FileNotFoundError: ")
    assert "Traceback" in log


def test_gpu_out_of_memory_has_its_own_code(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's out-of-memory error becomes exit code 22 with the fields to change."""

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(sft, "train", out_of_memory)
    assert worker.run_task(tmp_path, make_task()) == ExitCode.GPU_OUT_OF_MEMORY
    error = parse_event((tmp_path / EVENTS_FILE).read_text())
    assert isinstance(error, ErrorEvent)
    assert error.reason == "GpuOutOfMemory"
    assert "batchSize 4 and maxSequenceLength 128" in error.message
    assert "Tried to allocate 2.00 GiB" in error.message
    assert "More lines" not in error.message
