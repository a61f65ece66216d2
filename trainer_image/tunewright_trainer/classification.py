"""Sequence classification: one of several labels per text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel, Trainer

from tunewright_trainer import recipe, result, verify
from tunewright_trainer.adapter import adapter_config
from tunewright_trainer.arguments import classification_arguments
from tunewright_trainer.callback import ProgressCallback, Report, TokenisingReport
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.protocol import WorkerTask
from tunewright_trainer.recipe import Setup, Trained
from tunewright_trainer.rows import BATCH_ROWS, TokenFile, batched, read_rows, write_arrow
from tunewright_trainer.special_tokens import Framer
from tunewright_trainer.world import ALONE, World

MAX_LABELS = 1000
"""More look like free text, or like numbers to be predicted."""
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.int64())])


def train(task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
    """Train as the task says; see `recipe.run_recipe`."""
    recipe.run_recipe(task, report, scratch, world, train_and_save)


def train_and_save(setup: Setup, report: Report) -> Trained | None:
    """Tokenise the texts and learn their labels; see `recipe.learn`."""
    task, run = setup.task, setup.task.run
    assert run.objective.classification is not None, "resolve_objective fills the block"
    given = task.adapter_outputs or run.objective.classification.labels
    labels = tuple(given or setup.world.once_per_pod(lambda: labels_of(task.train_path)))
    train_rows, validation = recipe.token_files(setup, lambda path, label: tokenize(setup, labels, path, label, report))
    trainer = build_trainer(setup, recipe.load_start(setup, labels), train_rows, validation, report)
    probes = cast("Dataset", trainer.train_dataset)[: verify.PROBE_ROWS]["input_ids"]
    return recipe.learn(setup, trainer, train_rows, report, probes=probes, outputs=labels)


def labels_of(path: Path) -> list[str]:
    """Return the labels of the training rows: numbers in their order, words in the alphabet's.

    Raises:
        InvalidData: There is only one, or there are more than `MAX_LABELS`.
    """
    found = {row["label"] for row in read_rows(path)}
    if not 1 < len(found) <= MAX_LABELS:
        shown = ", ".join(sorted(found)[:5])
        raise InvalidData(
            f"the training rows have {len(found)} different labels ({shown}{', ...' if len(found) > 5 else ''}): "
            f"a classifier needs 2 to {MAX_LABELS}. Is dataset.columns.label the right column?"
        )
    return sorted(found, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))


def tokenize(setup: Setup, labels: Sequence[str], path: Path, label: str, report: Report) -> TokenFile:
    """Tokenise a file of labelled texts to disk.

    Raises:
        InvalidData: A row has a label that is not known.
    """
    limit = setup.task.run.hyperparameters.max_sequence_length
    numbers = {name: number for number, name in enumerate(labels)}
    advance = TokenisingReport(report, path, label)
    framer = Framer(setup.tokenizer)
    cut = 0

    def rows() -> Iterator[dict[str, Any] | None]:
        nonlocal cut
        first = 1
        for batch in batched(read_rows(path, advance), BATCH_ROWS):
            encoded = framer.encode([row["text"] for row in batch])
            for number, (row, ids) in enumerate(zip(batch, encoded, strict=True), first):
                if row["label"] not in numbers:
                    raise InvalidData(
                        f"{label} row {number}: label {row['label']!r} is not among {', '.join(labels[:20])}: correct "
                        "the row, or name all labels in objective.classification.labels"
                    )
                cut += len(ids) > limit
                yield {"input_ids": framer.cut(ids, limit), "labels": numbers[row["label"]]} if ids else None
            first += len(batch)

    written, dropped = write_arrow(rows(), _SCHEMA, setup.scratch / f"{label}.arrow")
    return TokenFile(setup.scratch / f"{label}.arrow", written, dropped, cut)


def build_trainer(
    setup: Setup,
    model: PreTrainedModel | PeftModel,
    train_rows: TokenFile,
    validation: TokenFile | None,
    report: Report,
) -> Trainer:
    """Return the trainer, with an adapter on the model where the method says so; the head is trained in any case."""
    trainer = Trainer(
        model=with_adapter(setup, model),
        args=classification_arguments(recipe.arguments(setup, evaluates=validation is not None)),
        train_dataset=Dataset.from_file(str(train_rows.path)),
        eval_dataset=Dataset.from_file(str(validation.path)) if validation else None,
        data_collator=DataCollatorWithPadding(setup.tokenizer),
        compute_metrics=scores,
        callbacks=[ProgressCallback(report)],
    )
    # A classifier's loss is the mean of its batch, though its forward takes a number of rows to divide by: the trainer
    # would neither divide it by the accumulation steps nor leave it alone with several processes.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def with_adapter(setup: Setup, model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Put the adapter on the model where the method says so and none is there, as TRL does for the other recipes."""
    run = setup.task.run
    if not setup.trains_adapter:
        return model
    adapted = model
    if not isinstance(model, PeftModel):
        adapted = get_peft_model(model, adapter_config(model, run, str(setup.task.model_path), "SEQ_CLS"))
    if run.hyperparameters.gradient_checkpointing:
        adapted.enable_input_require_grads()
    result.match_head(setup, adapted)
    if run.quantization is not None:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def scores(predicted: EvalPrediction) -> dict[str, float]:
    """Return accuracy, and F1 averaged over the labels that occur (macro: rare labels weigh as much as common ones)."""
    logits_BC = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    chosen_B, true_B = np.argmax(logits_BC, axis=-1), predicted.label_ids
    f1 = []
    for label in np.unique(true_B):
        hits = np.sum((chosen_B == label) & (true_B == label))
        f1.append(2 * hits / (np.sum(chosen_B == label) + np.sum(true_B == label)))
    return {"accuracy": float(np.mean(chosen_B == true_B)), "f1": float(np.mean(f1))}
