"""DPO and KTO: the model learns which answers people prefer, held near the model that it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer, KTOTrainer

from tunewright_trainer import preference_rows, recipe, samples, verify
from tunewright_trainer.adapter import adapter_config
from tunewright_trainer.arguments import dpo_config, kto_config
from tunewright_trainer.callback import ProgressCallback, Report, TokenisingReport
from tunewright_trainer.preference_rows import PreferenceTokenizer
from tunewright_trainer.protocol import WorkerTask
from tunewright_trainer.recipe import Setup, Trained
from tunewright_trainer.rows import TokenFile
from tunewright_trainer.world import ALONE, World


class TokenisedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's trainer on rows that arrive tokenised and cut: unlike SFTTrainer it has no argument for that."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenisedKTOTrainer(KTOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's trainer on rows that arrive tokenised and cut: unlike SFTTrainer it has no argument for that."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def train(task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
    """Train as the task says; see `recipe.run_recipe`."""
    recipe.run_recipe(task, report, scratch, world, train_and_save)


def train_and_save(setup: Setup, report: Report) -> Trained | None:
    """Tokenise the rows and learn from them; see `recipe.learn`."""
    task, run = setup.task, setup.task.run
    settings = run.objective.dpo or run.objective.kto
    assert settings is not None, "resolve_objective fills the block"
    rows = PreferenceTokenizer(setup.tokenizer, run.hyperparameters.max_sequence_length, settings.max_prompt_length)
    train_rows, validation = recipe.token_files(setup, lambda path, label: tokenize(setup, rows, path, label, report))
    trainer = build_trainer(setup, recipe.load_start(setup), train_rows, validation, report)
    answer = "chosen_ids" if run.objective.type == "DPO" else "completion_ids"
    first = trainer.train_dataset[: verify.PROBE_ROWS]
    return recipe.learn(
        setup,
        trainer,
        train_rows,
        report,
        probes=[p + a for p, a in zip(first["prompt_ids"], first[answer], strict=True)],
        prompts=samples.read_preference_prompts(task.validation_path or task.train_path, rows),
    )


def tokenize(setup: Setup, rows: PreferenceTokenizer, path: Path, label: str, report: Report) -> TokenFile:
    """Tokenise a file of rows to disk.

    Raises:
        InvalidData: No row is left within the length limit.
    """
    advance = TokenisingReport(report, path, label)
    if setup.task.run.objective.type == "DPO":
        return preference_rows.write_pairs(rows, path, label, setup.scratch, advance)
    batch_size = setup.task.run.hyperparameters.batch_size
    return preference_rows.write_singles(rows, path, label, setup.scratch, batch_size, advance)


def build_trainer(
    setup: Setup,
    model: PreTrainedModel | PeftModel,
    train_rows: TokenFile,
    validation: TokenFile | None,
    report: Report,
) -> DPOTrainer | KTOTrainer:
    """Return the trainer. The reference is the model without its adapter, or the adapter as it came, of which TRL keeps
    a copy; full fine-tuning needs a second model."""
    run = setup.task.run
    common = recipe.arguments(setup, evaluates=validation is not None)
    given: dict[str, Any] = {
        "model": model,
        "ref_model": None if setup.trains_adapter else recipe.load_base(setup),
        "train_dataset": Dataset.from_file(str(train_rows.path)),
        "eval_dataset": Dataset.from_file(str(validation.path)) if validation else None,
        "processing_class": setup.tokenizer,
        "peft_config": adapter_config(model, run, str(setup.task.model_path)),
        "callbacks": [ProgressCallback(report)],
    }
    if run.objective.dpo is not None:
        return TokenisedDPOTrainer(args=dpo_config(run, run.objective.dpo, common), **given)
    assert run.objective.kto is not None, "resolve_objective fills the block"
    return TokenisedKTOTrainer(args=kto_config(run, run.objective.kto, common), **given)
