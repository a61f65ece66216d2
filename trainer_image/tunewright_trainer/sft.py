"""Supervised fine-tuning: the model learns the next token of known answers."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTTrainer, pack_dataset

from tunewright_trainer import recipe, samples, verify
from tunewright_trainer.adapter import adapter_config
from tunewright_trainer.arguments import sft_config
from tunewright_trainer.callback import ProgressCallback, Report, TokenisingReport
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.packing import PackedSFTTrainer
from tunewright_trainer.protocol import WorkerTask
from tunewright_trainer.recipe import Setup, Trained
from tunewright_trainer.rows import RowTokenizer, TokenFile, read_rows, row_tokenizer, write_token_file
from tunewright_trainer.world import ALONE, World


def train(task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
    """Train as the task says; see `recipe.run_recipe`."""
    recipe.run_recipe(task, report, scratch, world, train_and_save)


def train_and_save(setup: Setup, report: Report) -> Trained | None:
    """Tokenise the rows and learn from them; see `recipe.learn`."""
    task, run = setup.task, setup.task.run
    settings = run.objective.sft
    assert settings is not None, "resolve_objective fills the block"
    rows = row_tokenizer(
        setup.tokenizer,
        task.row_format,
        run.hyperparameters.max_sequence_length,
        learns_all=settings.loss == "AllTokens",
    )
    train_rows, validation = recipe.token_files(
        setup, lambda path, label: tokenize(rows, path, label, setup.scratch, report)
    )
    trainer = build_trainer(setup, recipe.load_start(setup), train_rows, validation, report)
    return recipe.learn(
        setup,
        trainer,
        train_rows,
        report,
        probes=trainer.train_dataset[: verify.PROBE_ROWS]["input_ids"],
        prompts=samples.read_prompts(task.validation_path or task.train_path, rows),
    )


def tokenize(rows: RowTokenizer, path: Path, label: str, scratch: Path, report: Report) -> TokenFile:
    """Tokenise a file of rows to disk.

    Raises:
        InvalidData: No row has anything to learn from.
    """
    read = read_rows(path, TokenisingReport(report, path, label))
    tokens = write_token_file(rows.tokenize(read, label), scratch / f"{label}.arrow")
    if tokens.rows == 0:
        raise InvalidData(
            f"none of the {tokens.dropped} {label} rows has a token to learn: {tokens.cut} were cut at "
            f"{rows.max_length} tokens before their answer, the others have no answer. "
            "Raise hyperparameters.maxSequenceLength or shorten the prompts"
        )
    return tokens


def build_trainer(
    setup: Setup,
    model: PreTrainedModel | PeftModel,
    train_rows: TokenFile,
    validation: TokenFile | None,
    report: Report,
) -> SFTTrainer:
    """Return the trainer, with an adapter on the model where the method says so."""
    run = setup.task.run
    dataset = Dataset.from_file(str(train_rows.path))
    packed, length = run.hyperparameters.packing, run.hyperparameters.max_sequence_length
    in_rows = packed and not model._is_stateful  # see packing.py
    if packed:
        dataset = setup.world.once_per_pod(lambda: pack_dataset(dataset, length, "bfd"))
    return (PackedSFTTrainer if in_rows else SFTTrainer)(
        model=model,
        args=sft_config(run, recipe.arguments(setup, evaluates=validation is not None), packing=packed and not in_rows),
        train_dataset=dataset,
        eval_dataset=Dataset.from_file(str(validation.path)) if validation else None,
        processing_class=setup.tokenizer,
        peft_config=adapter_config(model, run, str(setup.task.model_path)),
        callbacks=[ProgressCallback(report)],
    )
