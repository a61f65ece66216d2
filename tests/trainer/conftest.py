"""Fixtures of the trainer tests: a tiny random Llama with a real tokenizer, and tasks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

# Read when the libraries are imported: tests must not look for a model hub, and on a busy machine the threads of a tiny
# matrix product wait for each other longer than they compute.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from pydantic import BaseModel

from tests.cluster.model import tiny_llama
from tunewright_api.run_config import StorageSettings, build_train_run
from tunewright_api.validation import parse_finetunejob
from tunewright_trainer.protocol import RowFormat, WorkerTask

EXCHANGES = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."} for a in range(6) for b in range(4)
]
MakeTask = Callable[..., WorkerTask]
E = TypeVar("E", bound=BaseModel)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: hidden size 64, 2 layers, SmolLM2's tokenizer and chat template."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make_task(tiny: Path, tmp_path: Path) -> MakeTask:
    """Builds a task on the tiny model; keyword arguments replace parts of the spec."""
    return task_maker(tiny, tmp_path)


def task_maker(tiny: Path, tmp_path: Path) -> MakeTask:
    """Return what builds a task with its files in a folder."""

    def make(
        *,
        rows: list[dict[str, Any]] = EXCHANGES,
        validation: list[dict[str, Any]] | None = None,
        row_format: RowFormat = "PromptCompletion",
        model_path: Path = tiny,
        hyperparameters: dict[str, Any] | None = None,
        **changes: Any,
    ) -> WorkerTask:
        steps = {"maxSteps": 4, "batchSize": 4, "gradientAccumulationSteps": 1, "learningRate": 0.01}
        spec: dict[str, Any] = {
            "model": {"uri": "hf://tests/tiny", "dtype": "Float32"},
            "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
            "method": {"type": "LoRA"},
            "hyperparameters": {**steps, "maxSequenceLength": 128, **(hyperparameters or {})},
            "output": {"uri": "s3://models/tiny"},
            "resources": {"gpus": 0},
            **changes,
        }
        if validation is not None:
            spec["dataset"]["validation"] = [{"uri": "s3://data/validation.jsonl"}]
        document = {"apiVersion": "tunewright.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "t"}}
        job = parse_finetunejob({**document, "spec": spec})
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        return WorkerTask(
            run=build_train_run(job.spec, name="t", namespace="n", attempt=1, storage=StorageSettings()),
            model_path=model_path,
            train_path=write_rows(tmp_path / "train.jsonl", rows),
            validation_path=write_rows(tmp_path / "validation.jsonl", validation) if validation else None,
            row_format=row_format,
            output_path=output,
        )

    return make


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Events(list[BaseModel]):
    """What a run reported, in order."""

    def of(self, kind: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self if isinstance(event, kind)]


class Train(Protocol):
    """The recipe, in this process."""

    def __call__(self, task: WorkerTask, events: Events | None = None) -> Events:
        """Train and return what was reported; `events`, where given, has it even if the run raises."""


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Runs the recipe in this process."""
    from tunewright_trainer import worker

    def run(task: WorkerTask, events: Events | None = None) -> Events:
        reported = Events() if events is None else events
        worker.recipe_of(task)(task, reported.append, tmp_path / "scratch")
        return reported

    return run
