"""Every example trains: on a tiny model to the end, and where its text matters on a real small one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.model import smollm2
from tests.platform import ROOT, example_data
from tests.trainer.conftest import Train
from tunewright_api.run_config import StorageSettings, build_train_run
from tunewright_api.validation import parse_finetunejob
from tunewright_trainer.dataset import prepare
from tunewright_trainer.protocol import EvaluationEvent, ResultEvent, StepEvent, WorkerTask
from tunewright_trainer.transfer import Stop, ignore

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.yaml"))}
RUNNABLE = [name for name in EXAMPLES if name not in ("secret", "quickstart-gpu") and not name.startswith("merge-")]
"""Those of merges are run in test_merge_runs.py."""


def task_of(name: str, model: Path, folder: Path, **hyperparameters: Any) -> WorkerTask:
    """Return an example as a task for one worker, its rows checked and normalised as the supervisor does."""
    document = copy.deepcopy(yaml.safe_load(EXAMPLES[name].read_text()))
    given = document["spec"]["hyperparameters"]
    # PyYAML reads 1e-3 as text.
    given |= {"learningRate": float(given["learningRate"]), **hyperparameters}
    run = build_train_run(
        parse_finetunejob(document).spec, name=name, namespace="n", attempt=1, storage=StorageSettings()
    )
    run = run.model_copy(update={"nodes": 1})
    files = example_data()
    sources = [*run.dataset.train, *(run.dataset.validation or [])]
    paths = {s.address: {s.uri: files[f"docstrings/{s.uri.rpartition('/')[2]}"]} for s in sources}
    seed, objective = run.hyperparameters.seed, run.objective
    data = prepare(run.dataset, paths, folder / "data", seed, Stop(), ignore, objective.type, objective.reward_columns)
    output = folder / "output"
    output.mkdir()
    return WorkerTask(
        run=run,
        model_path=model,
        train_path=data.train_path,
        validation_path=data.validation_path,
        row_format=data.format.row_format,
        output_path=output,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNNABLE)
def test_examples_run_to_the_end(name: str, tiny: Path, tmp_path: Path, train: Train) -> None:
    """Three steps on the tiny model: losses are numbers, and the result loads to the trained logits."""
    events = train(task_of(name, tiny, tmp_path, maxSteps=3))
    assert [event.step for event in events.of(StepEvent)] == [1, 2, 3]
    assert isinstance(events[-1], ResultEvent)


@pytest.mark.timeout(900)
def test_dpo_learns_preferences_on_a_real_model(tmp_path: Path, train: Train) -> None:
    """On questions it has not seen the tuned model tells the right answer from another one more often than before."""
    events = train(task_of("dpo-lora", smollm2(), tmp_path, maxSteps=12, maxSequenceLength=64))
    before, after = (events.of(EvaluationEvent)[i] for i in (0, -1))
    assert before.loss == pytest.approx(0.6931, abs=0.01)
    assert after.loss < 0.6
    assert after.metrics is not None
    assert after.metrics["rewards/accuracies"] > 0.7


@pytest.mark.timeout(900)
def test_classification_beats_the_majority_on_a_real_model(tmp_path: Path, train: Train) -> None:
    """Always answering the common label is right for 22 of the 30 validation rows, with an F1 of 0.42."""
    events = train(task_of("classification-lora", smollm2(), tmp_path))
    before, after = (events.of(EvaluationEvent)[i] for i in (0, -1))
    assert after.loss < before.loss / 2
    assert after.metrics is not None
    assert after.metrics["accuracy"] > 0.9, after.metrics
    assert after.metrics["f1"] > 0.9, after.metrics
