"""Group relative policy optimization: of several answers to a prompt, those with more reward than the others become
likelier (Shao et al. 2024)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from pydantic import BaseModel
from transformers import PreTrainedModel
from trl import GRPOTrainer

from tunewright_trainer import recipe, reward_function, samples, verify
from tunewright_trainer.adapter import adapter_config
from tunewright_trainer.arguments import grpo_config
from tunewright_trainer.callback import ProgressCallback, Report, TokenisingReport
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.prompt_rows import write_prompts
from tunewright_trainer.protocol import EvaluationEvent, StepEvent, WorkerTask
from tunewright_trainer.recipe import Setup, Trained
from tunewright_trainer.reward_models import load_reward_models
from tunewright_trainer.rewards import Answer, Reward, Score, build_rewards
from tunewright_trainer.rows import TokenFile
from tunewright_trainer.world import ALONE, World

SHOWN = frozenset(
    {
        *("reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio/region_mean"),
        *("completions/mean_length", "completions/clipped_ratio"),
    }
)
"""What people look at of the thirty numbers that TRL logs, besides the mean of each reward."""


class TokenisedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's trainer on prompts that arrive tokenised and cut: it has no limit for them any more."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the same random draws each time, so that only the model makes the difference; training's own
        draws go on as if nothing had been."""
        with torch.random.fork_rng():
            # Of several processes each draws its own: some may answer the same prompt.
            torch.manual_seed(self.args.seed + self.args.process_index)
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics


def train(task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
    """Train as the task says; see `recipe.run_recipe`."""
    recipe.run_recipe(task, report, scratch, world, train_and_save)


def train_and_save(setup: Setup, report: Report) -> Trained | None:
    """Tokenise the prompts and learn from their answers; see `recipe.learn`."""
    # First: a function that cannot be imported is told before anything large is loaded.
    with reward_function.started(setup.task.run.objective.rewards) as functions:
        return learn_from_rewards(setup, report, functions)


def learn_from_rewards(setup: Setup, report: Report, functions: Sequence[Score]) -> Trained | None:
    """Do all that `train_and_save` does, with the users' own functions at hand."""
    run = setup.task.run
    settings = run.objective.grpo
    assert settings is not None, "a rule asks for the block"
    limit = settings.max_prompt_length or run.hyperparameters.max_sequence_length - settings.max_completion_length
    train_rows, validation = recipe.token_files(setup, lambda path, label: tokenize(setup, path, label, limit, report))
    check_count(setup, train_rows.rows)
    rewards = build_rewards(settings.rewards, load_reward_models(setup), functions)
    trainer = build_trainer(setup, recipe.load_start(setup), rewards, train_rows, validation, report)
    return recipe.learn(
        setup,
        trainer,
        train_rows,
        report,
        probes=trainer.train_dataset[: verify.PROBE_ROWS]["prompt"],
        prompts=read_prompts(trainer.eval_dataset or trainer.train_dataset, run.objective.reward_columns),
    )


def tokenize(setup: Setup, path: Path, label: str, limit: int, report: Report) -> TokenFile:
    """Tokenise a file of prompts to disk; see `write_prompts`."""
    advance = TokenisingReport(report, path, label)
    return write_prompts(setup.tokenizer, path, label, setup.scratch, limit, advance)


def check_count(setup: Setup, rows: int) -> None:
    """Refuse fewer prompts than one step takes, of which no step could be made.

    Raises:
        InvalidData: Saying how many are needed.
    """
    run = setup.task.run
    given, settings = run.hyperparameters, run.objective.grpo
    assert settings is not None, "a rule asks for the block"
    needed = given.batch_size * given.gradient_accumulation_steps * run.world_size // settings.generations
    if rows < needed:
        processes = f" x {run.world_size} processes" if run.world_size > 1 else ""
        raise InvalidData(
            f"there are {rows} training rows, but a step takes {needed} prompts (batchSize x "
            f"gradientAccumulationSteps{processes} / grpo.generations): add rows, or lower one of the two"
        )


def build_trainer(
    setup: Setup,
    model: PreTrainedModel | PeftModel,
    rewards: Sequence[Reward],
    train_rows: TokenFile,
    validation: TokenFile | None,
    report: Report,
) -> GRPOTrainer:
    """Return the trainer. The reference, where there is one, is the model without its adapter, or the adapter as it
    came, of which TRL keeps a copy; full fine-tuning loads a second model."""
    run = setup.task.run
    assert run.objective.grpo is not None, "a rule asks for the block"
    common = recipe.arguments(setup, evaluates=validation is not None)
    return TokenisedGRPOTrainer(
        model=model,
        reward_funcs=[as_reward_function(reward) for reward in rewards],
        args=grpo_config(run, run.objective.grpo, common),
        train_dataset=Dataset.from_file(str(train_rows.path)),
        eval_dataset=Dataset.from_file(str(validation.path)) if validation else None,
        processing_class=setup.tokenizer,
        peft_config=adapter_config(model, run, str(setup.task.model_path)),
        callbacks=[ProgressCallback(shown(report))],
    )


def as_reward_function(reward: Reward) -> Callable[..., list[float]]:
    """Return a reward in the form that TRL calls; its name is that of its metrics."""

    def function(completions: list[str], completion_ids: list[list[int]], row: list[str], **_: Any) -> list[float]:
        answers = []
        for text, ids, document in zip(completions, completion_ids, row, strict=True):
            values = json.loads(document)
            columns = json.loads(values["columns"])
            answers.append(Answer(values["prompt"], text, len(ids), columns, values["place"]))
        return reward.score(answers)

    function.__name__ = reward.name
    return function


def shown(report: Report) -> Report:
    """Pass events on with the metrics that people look at apart from the others; the status has room for few."""

    def told(event: BaseModel) -> None:
        if isinstance(event, StepEvent | EvaluationEvent) and event.metrics is not None:
            kept = {
                name: value
                for name, value in event.metrics.items()
                if name in SHOWN or (name.startswith("rewards/") and name.endswith("/mean"))
            }
            others = {name: value for name, value in event.metrics.items() if name not in kept}
            event = event.model_copy(update={"metrics": kept, "details": others})
        report(event)

    return told


def read_prompts(rows: Dataset, answer_columns: Sequence[str]) -> list[samples.Prompt]:
    """Return the first prompts of the tokenised rows; expected is the right answer, where there is one."""
    prompts = []
    for row in rows.select(range(min(samples.SAMPLES, len(rows)))):
        values = json.loads(row["row"])
        asked = values["prompt"]
        columns = json.loads(values["columns"])
        expected = str(columns[answer_columns[0]]) if answer_columns else ""
        prompts.append(
            samples.Prompt(asked if isinstance(asked, str) else asked[-1]["content"], expected, row["prompt"])
        )
    return prompts
