"""GRPO and PPO learn from a function of the user's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import Events, MakeTask, Train
from tests.trainer.test_continue_from import PROMPTS
from tunewright_trainer.errors import InvalidConfiguration, RewardFunctionFailed
from tunewright_trainer.protocol import EvaluationEvent, ResultEvent, StepEvent

pytestmark = [
    pytest.mark.timeout(300),
    # TRL 1.16 turns checkpointing off for generation by its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning"),
]

CODE = """
import re

def words(prompts, completions, columns):
    assert all("answer" in row for row in columns)
    return [float(bool(re.search("^ [a-z]", text))) for text in completions]

def late(prompts, completions, columns):
    if "What is 2 plus 1?" in prompts:
        raise LookupError("no such sum")
    return [0.0] * len(prompts)
"""
LEARNING: dict[str, dict[str, Any]] = {"GRPO": {"generations": 8}, "PPO": {}}
REGEX = {"type": "Regex", "regex": {"pattern": "^ [a-z]"}}


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's module `own`."""
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))


def own(name: str) -> dict[str, Any]:
    """Return a reward by a function of the module."""
    return {"type": "Function", "function": {"module": f"own:{name}"}}


def task_of(make_task: MakeTask, objective: str, *rewards: dict[str, Any], steps: int = 3, **changes: Any) -> Any:
    """Return a task on prompts with short answers."""
    block = {"rewards": list(rewards), "maxCompletionLength": 3, **LEARNING[objective]}
    return make_task(
        rows=PROMPTS,
        row_format="Prompts",
        objective={"type": objective, objective.lower(): block},
        hyperparameters={"maxSteps": steps, "batchSize": 16},
        **changes,
    )


def measured(events: Events, name: str) -> list[float]:
    """Return a metric of every step."""
    return [(event.metrics or {})[name] for event in events.of(StepEvent)]


@pytest.mark.parametrize("objective", LEARNING)
def test_a_function_rewards_as_a_built_in_reward_does(objective: str, make_task: MakeTask, train: Train) -> None:
    """The same reward, once ours and once the user's: the same answers, the same numbers, in evaluations too."""
    ours = train(task_of(make_task, objective, REGEX, validation=PROMPTS[:2]))
    theirs = train(task_of(make_task, objective, own("words"), validation=PROMPTS[:2]))
    assert measured(theirs, "rewards/Function/mean") == measured(ours, "rewards/Regex/mean")
    assert [event.loss for event in theirs.of(StepEvent)] == [event.loss for event in ours.of(StepEvent)]
    rewards = [[(event.metrics or {})["reward"] for event in events.of(EvaluationEvent)] for events in (ours, theirs)]
    assert rewards[0] == rewards[1]
    assert theirs.of(ResultEvent)[0].reload_max_difference < 1e-4


@pytest.mark.parametrize("objective", LEARNING)
def test_a_function_that_fails_ends_the_run(objective: str, make_task: MakeTask, train: Train) -> None:
    """The row that it could not judge is named by its place among the training rows, whenever its turn comes."""
    with pytest.raises(RewardFunctionFailed, match=r"own:late raised LookupError: no such sum, for training row 10 "):
        train(task_of(make_task, objective, REGEX, own("late"), steps=len(PROMPTS)))


@pytest.mark.parametrize("objective", LEARNING)
def test_a_function_that_is_not_there(
    objective: str, make_task: MakeTask, train: Train, tiny: Path, tmp_path: Path
) -> None:
    """It is told before there is need for weights."""
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InvalidConfiguration, match=r"rewards\[1\]\.function own:absent cannot be imported: its module"):
        train(task_of(make_task, objective, REGEX, own("absent"), model_path=folder))
