"""Supervised fine-tuning: full, LoRA and QLoRA. The recipe is `train`; it reads from top to bottom."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTTrainer, pack_dataset

from tunewright_trainer import samples, verify
from tunewright_trainer.arguments import sft_config
from tunewright_trainer.callback import ProgressCallback, Report
from tunewright_trainer.errors import InvalidData, InvalidModel
from tunewright_trainer.hardware import TORCH_DTYPES, Hardware, Precision, choose_precision, find_hardware
from tunewright_trainer.lora import lora_config
from tunewright_trainer.model import base_model_id, load_model, load_tokenizer, peak_memory_bytes
from tunewright_trainer.protocol import PlanEvent, ResultEvent, StageEvent, WorkerTask
from tunewright_trainer.rows import RowTokenizer, TokenFile, read_rows, row_tokenizer, write_token_file

_REPORTED_VERSIONS = (
    "tunewright", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers",
    "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What a run needs besides the model."""

    task: WorkerTask
    hardware: Hardware
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    rows: RowTokenizer
    train: TokenFile
    validation: TokenFile | None
    scratch: Path

    @property
    def trains_adapter(self) -> bool:
        """Tell whether the result is an adapter."""
        return self.task.run.method != "Full"

    @property
    def result_path(self) -> Path:
        """Folder that from_pretrained loads."""
        return self.task.output_path / ("adapter" if self.trains_adapter else "model")

    @property
    def result_dtype(self) -> torch.dtype:
        """Number format that the result is used in."""
        return TORCH_DTYPES[self.precision.name]


@dataclass(frozen=True)
class Trained:
    """What is left of the training once its memory is given back."""

    probe: verify.Probe
    steps: int
    loss: float
    seconds: float


def train(task: WorkerTask, report: Report, scratch: Path) -> None:
    """Train as the task says, leave verified files in the output folder and report the result.

    Args:
        task: Run document and local files.
        report: Takes the events.
        scratch: Folder for files that are of no use afterwards.

    Raises:
        InvalidInput: Data, model or configuration cannot work.
        Diverged: The loss became NaN or infinite.
        VerificationFailed: The saved files do not give the trained model's logits.
    """
    report(StageEvent(stage="Loading"))
    setup = prepare(task, scratch)
    trained = train_and_save(setup, report)
    # The model and the optimizer died with the frame of train_and_save; what is loaded now takes their memory.
    gc.collect()
    if setup.hardware.on_gpu:
        torch.cuda.empty_cache()
    report(StageEvent(stage="Verifying"))
    reloaded = verify.record_probe(load_result(setup), trained.probe.ids_BT)
    difference = verify.compare(trained.probe, reloaded, setup.result_dtype)
    trained.probe.save(task.output_path, setup.precision.name)
    report(
        ResultEvent(
            kind="Adapter" if setup.trains_adapter else "Model",
            root="adapter" if setup.trains_adapter else "model",
            steps=trained.steps,
            train_loss=trained.loss,
            reload_max_difference=difference,
            train_seconds=trained.seconds,
            peak_memory_bytes=peak_memory_bytes(on_gpu=setup.hardware.on_gpu),
            versions=versions(),
        )
    )


def prepare(task: WorkerTask, scratch: Path) -> Setup:
    """Look at the hardware and tokenise the rows."""
    hardware = find_hardware(task.run.gpus)
    precision = choose_precision(task.run, hardware)
    tokenizer = load_tokenizer(task.model_path, task.run)
    rows = row_tokenizer(tokenizer, task.row_format, task.run.hyperparameters.max_sequence_length)
    scratch.mkdir(parents=True, exist_ok=True)
    train_file = tokenize(rows, task.train_path, "training", scratch)
    validation = tokenize(rows, task.validation_path, "validation", scratch) if task.validation_path else None
    return Setup(task, hardware, precision, tokenizer, rows, train_file, validation, scratch)


def tokenize(rows: RowTokenizer, path: Path, label: str, scratch: Path) -> TokenFile:
    """Tokenise a file of rows to disk.

    Raises:
        InvalidData: No row has anything to learn from.
    """
    tokens = write_token_file(rows.tokenize(read_rows(path), label), scratch / f"{label}.arrow")
    if tokens.rows == 0:
        raise InvalidData(
            f"none of the {tokens.dropped} {label} rows has a token to learn: {tokens.cut} were cut at "
            f"{rows.max_length} tokens before their answer, the others have no answer. "
            "Raise hyperparameters.maxSequenceLength or shorten the prompts"
        )
    return tokens


def train_and_save(setup: Setup, report: Report) -> Trained:
    """Train, evaluate before and after, write samples and result files, and record the probe."""
    task, run = setup.task, setup.task.run
    model = load_model(
        task.model_path, run, setup.precision, weights=setup.precision.weights, on_gpu=setup.hardware.on_gpu
    )
    check_vocabulary(model, setup.tokenizer)
    model.name_or_path = base_model_id(run)  # what the adapter names as its base, instead of a folder of this pod
    trainer = build_trainer(setup, model, report)
    report(plan(setup, trainer))

    if setup.validation is not None:
        trainer.evaluate()
    prompts = samples.read_prompts(task.validation_path or task.train_path, setup.rows)
    base_answers = [] if setup.trains_adapter else samples.answers(trainer.model, setup.tokenizer, prompts)

    report(StageEvent(stage="Training"))
    began = time.monotonic()
    # Evaluation and answers drew random numbers; dropout must not depend on whether they took place.
    set_seed(run.hyperparameters.seed)
    loss = trainer.train().training_loss
    seconds = time.monotonic() - began
    if not setup.trains_adapter:
        # Weights only, as they are saved: buffers such as rotary frequencies stay in float32 when a model is loaded.
        for weight in trainer.model.parameters():
            weight.data = weight.data.to(setup.result_dtype)
    if setup.validation is not None and not is_evaluated(trainer, setup):
        trainer.evaluate()

    # From here on without the trainer's autocast: the model as a user runs it.
    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    tuned_answers = samples.answers(tuned, setup.tokenizer, prompts)
    if setup.trains_adapter:
        with tuned.disable_adapter():
            base_answers = samples.answers(tuned, setup.tokenizer, prompts)
    save(setup, tuned, samples.as_documents(prompts, base_answers, tuned_answers))
    ids_BT = verify.probe_ids(trainer.train_dataset[: verify.PROBE_ROWS]["input_ids"])
    return Trained(verify.record_probe(tuned, ids_BT), trainer.state.global_step, loss, seconds)


def build_trainer(setup: Setup, model: PreTrainedModel, report: Report) -> SFTTrainer:
    """Return the trainer, with an adapter on the model where the method says so."""
    run = setup.task.run
    train_rows = Dataset.from_file(str(setup.train.path))
    if run.hyperparameters.packing:
        train_rows = pack_dataset(train_rows, run.hyperparameters.max_sequence_length, "bfd")
    trainer = SFTTrainer(
        model=model,
        args=sft_config(
            run,
            setup.precision,
            on_gpu=setup.hardware.on_gpu,
            scratch=setup.scratch / "trainer",
            evaluates=setup.validation is not None,
        ),
        train_dataset=train_rows,
        eval_dataset=Dataset.from_file(str(setup.validation.path)) if setup.validation else None,
        processing_class=setup.tokenizer,
        peft_config=lora_config(model, run.lora, run.model.revision) if run.lora else None,
        callbacks=[ProgressCallback(report)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of another model, which would index past the embedding.

    Raises:
        InvalidModel: The tokenizer has more tokens than the model.
    """
    embedding = cast("nn.Embedding", model.get_input_embeddings())
    if len(tokenizer) > embedding.num_embeddings:
        raise InvalidModel(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {embedding.num_embeddings} embeddings: "
            "the files in the model's folder do not belong together"
        )


def plan(setup: Setup, trainer: SFTTrainer) -> PlanEvent:
    """Return what is known before the first step."""
    model = trainer.model
    total_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        targets = sorted(model.peft_config["default"].target_modules)
    else:
        trainable, total, targets = model.num_parameters(only_trainable=True), model.num_parameters(), None
    return PlanEvent(
        total_steps=total_steps,
        dtype=setup.precision.name,
        trainable_parameters=trainable,
        total_parameters=total,
        target_modules=targets,
        train_rows=setup.train.rows,
        dropped_rows=setup.train.dropped,
    )


def is_evaluated(trainer: SFTTrainer, setup: Setup) -> bool:
    """Tell whether the weights as they are saved were evaluated: after the last step, and not rounded since."""
    last = any("eval_loss" in log and log["step"] == trainer.state.global_step for log in trainer.state.log_history)
    return last and (setup.trains_adapter or setup.result_dtype == setup.precision.weights)


def save(setup: Setup, model: PreTrainedModel | PeftModel, answers: list[dict[str, str]]) -> None:
    """Write the adapter or the model with its tokenizer, and samples.json."""
    setup.result_path.mkdir(parents=True, exist_ok=True)
    if setup.trains_adapter:
        # The vocabulary is never resized; "auto" would ask the hub about the base model to find that out.
        model.save_pretrained(setup.result_path, save_embedding_layers=False)
        (setup.result_path / "README.md").unlink()  # peft's unfilled form of a model card
    else:
        model.save_pretrained(setup.result_path)
    setup.tokenizer.save_pretrained(setup.result_path)
    text = json.dumps(answers, ensure_ascii=False, indent=2)
    (setup.task.output_path / "samples.json").write_text(text + "\n", encoding="utf-8")


def load_result(setup: Setup) -> PreTrainedModel | PeftModel:
    """Load the saved files as a user would."""
    run, precision, on_gpu = setup.task.run, setup.precision, setup.hardware.on_gpu
    if not setup.trains_adapter:
        return load_model(setup.result_path, run, precision, weights=setup.result_dtype, on_gpu=on_gpu)
    base = load_model(setup.task.model_path, run, precision, weights=precision.weights, on_gpu=on_gpu)
    model = PeftModel.from_pretrained(base, setup.result_path)
    if run.quantization is not None:
        # TRL trains adapters on a quantized base in bfloat16; peft loads them as float32, which rounds elsewhere.
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def versions() -> dict[str, str]:
    """Return the versions that shape a result."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _REPORTED_VERSIONS
    }
