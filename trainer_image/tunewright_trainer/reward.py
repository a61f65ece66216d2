"""Reward model: one number per answer, trained so that the better answer gets the higher one."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import RewardTrainer

from tunewright_trainer import recipe, result, verify
from tunewright_trainer.adapter import adapter_config
from tunewright_trainer.arguments import reward_config
from tunewright_trainer.callback import ProgressCallback, Report, TokenisingReport
from tunewright_trainer.preference_rows import PreferenceTokenizer, write_scored
from tunewright_trainer.protocol import REWARD_OUTPUTS, WorkerTask
from tunewright_trainer.recipe import Setup, Trained
from tunewright_trainer.rows import TokenFile
from tunewright_trainer.world import ALONE, World


def train(task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
    """Train as the task says; see `recipe.run_recipe`."""
    recipe.run_recipe(task, report, scratch, world, train_and_save)


def train_and_save(setup: Setup, report: Report) -> Trained | None:
    """Tokenise the pairs and learn from them; see `recipe.learn`."""
    run = setup.task.run
    rows = PreferenceTokenizer(setup.tokenizer, run.hyperparameters.max_sequence_length, None, needs_end=False)
    train_rows, validation = recipe.token_files(setup, lambda path, label: tokenize(setup, rows, path, label, report))
    trainer = build_trainer(setup, recipe.load_start(setup, REWARD_OUTPUTS), train_rows, validation, report)
    probes = trainer.train_dataset[: verify.PROBE_ROWS]["chosen_ids"]
    return recipe.learn(setup, trainer, train_rows, report, probes=probes, outputs=REWARD_OUTPUTS)


def tokenize(setup: Setup, rows: PreferenceTokenizer, path: Path, label: str, report: Report) -> TokenFile:
    """Tokenise a file of pairs to disk.

    Raises:
        InvalidData: No pair is left within the length limit.
    """
    return write_scored(rows, path, label, setup.scratch, TokenisingReport(report, path, label))


def build_trainer(
    setup: Setup,
    model: PreTrainedModel | PeftModel,
    train_rows: TokenFile,
    validation: TokenFile | None,
    report: Report,
) -> RewardTrainer:
    """Return the trainer, with an adapter on the model where the method says so and none is there; the head is trained
    in any case."""
    run = setup.task.run
    assert run.objective.reward is not None, "resolve_objective fills the block"
    common = recipe.arguments(setup, evaluates=validation is not None)
    trainer = RewardTrainer(
        model=model,
        args=reward_config(run, run.objective.reward, common),
        train_dataset=Dataset.from_file(str(train_rows.path)),
        eval_dataset=Dataset.from_file(str(validation.path)) if validation else None,
        processing_class=setup.tokenizer,
        peft_config=adapter_config(model, run, str(setup.task.model_path), "SEQ_CLS"),
        callbacks=[ProgressCallback(report)],
    )
    result.match_head(setup, trainer.model)
    return trainer
