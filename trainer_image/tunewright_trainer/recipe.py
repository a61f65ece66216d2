"""What all recipes share, in the order in which they use it: preparation, training, and proof of the saved result."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from tunewright_trainer import result, samples, verify
from tunewright_trainer.adapter import with_loaded_adapter
from tunewright_trainer.arguments import check_extra, common_arguments
from tunewright_trainer.callback import Report
from tunewright_trainer.hardware import TORCH_DTYPES, Hardware, Precision, choose_precision, find_hardware, name_of
from tunewright_trainer.model import base_model_id, load_model, load_tokenizer, peak_memory_bytes
from tunewright_trainer.parallelism import Parallelism, choose_parallelism
from tunewright_trainer.preflight import check_model
from tunewright_trainer.protocol import PlanEvent, ResultEvent, StageEvent, WorkerTask
from tunewright_trainer.rows import TokenFile
from tunewright_trainer.selection import Selection, is_last_step_evaluated
from tunewright_trainer.sharding import let_go, local, packed_away, sharded_over
from tunewright_trainer.world import ALONE, World

_REPORTED_VERSIONS = (
    "tunewright", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers",
    "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What a run needs besides rows and model."""

    task: WorkerTask
    hardware: Hardware
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    scratch: Path
    world: World = ALONE
    parallelism: Parallelism | None = None
    """How several processes hold the model; None: there is only one."""
    sharding: DistributedConfig | None = None
    """How the model is spread over them; None: each process has all of it."""

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

    @property
    def proof_dtype(self) -> torch.dtype:
        """Number format of the weights that the saved files are compared with what was trained in.

        Sharded weights keep the format in which they were trained, which for all weights of a model is float32.
        """
        return self.result_dtype if self.sharding is None or self.trains_adapter else torch.float32

    @property
    def takes_part(self) -> bool:
        """Tell whether this process runs the model where one would do: the first one, or all that hold it together."""
        return self.world.is_first or self.sharding is not None


@dataclass(frozen=True)
class Trained:
    """What is left of the training once its memory is given back."""

    probe: verify.Probe
    steps: int
    loss: float
    seconds: float
    outputs: tuple[str, ...] | None = None
    """Names of the outputs of a classification head; None: a language model."""


class Recipe(Protocol):
    """What trains for one objective; see `run_recipe`."""

    def __call__(self, task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
        """Train as the task says."""


def run_recipe(
    task: WorkerTask,
    report: Report,
    scratch: Path,
    world: World,
    train_and_save: Callable[[Setup, Report], Trained | None],
) -> None:
    """Train as the task says, leave verified files in the output folder and report the result.

    Args:
        task: Run document and local files.
        report: Takes the events.
        scratch: Folder for files that are of no use afterwards; all processes of a pod share it.
        world: The processes that train together.
        train_and_save: The recipe; gives None in processes that have no part in the proof.

    Raises:
        InvalidInput: Data, model or configuration cannot work.
        Diverged: The loss became NaN or infinite.
        VerificationFailed: The saved files do not give the trained model's logits.
    """
    report(StageEvent(stage="Loading"))
    setup = prepare(task, scratch, world)
    trained = train_and_save(setup, report)
    if trained is None:
        return
    # The model and the optimizer died with the frame of train_and_save; what is loaded now takes their memory.
    gc.collect()
    if setup.hardware.on_gpu:
        torch.cuda.empty_cache()
    report(StageEvent(stage="Verifying"))
    reloaded = verify.record_probe(result.load_result(setup, trained.outputs), trained.probe.ids_BT)
    if setup.sharding is not None:
        world.leave()
        if not world.is_first:
            return
    difference = verify.compare(trained.probe, reloaded, setup.proof_dtype)
    trained.probe.save(task.output_path, name_of(setup.proof_dtype))
    report(
        ResultEvent(
            kind="Adapter" if setup.trains_adapter else "Model",
            root="adapter" if setup.trains_adapter else "model",
            steps=trained.steps,
            train_loss=trained.loss,
            outputs=list(trained.outputs) if trained.outputs else None,
            reload_max_difference=difference,
            train_seconds=trained.seconds,
            peak_memory_bytes=peak_memory_bytes(on_gpu=setup.hardware.on_gpu),
            versions=versions(),
        )
    )


def prepare(task: WorkerTask, scratch: Path, world: World = ALONE) -> Setup:
    """Look at the hardware, load the tokenizer, and check all that needs no weights.

    Raises:
        InvalidModel, InvalidAdapter, InvalidConfiguration: The parts do not fit one another.
    """
    hardware = find_hardware(task.run.gpus, world.local_rank)
    scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(task.model_path, task.run)
    if task.adapter_path is not None and task.run.model.chat_template is None:
        # The adapter learned with its own template, which need not be the base model's.
        template = task.adapter_path / "chat_template.jinja"
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    setup = Setup(task, hardware, choose_precision(task.run, hardware), tokenizer, scratch, world)
    if task.run.hyperparameters.extra:
        check_extra(task.run, arguments(setup, evaluates=task.validation_path is not None))
    return with_parallelism(setup, check_model(task, tokenizer))


def with_parallelism(setup: Setup, empty: PreTrainedModel) -> Setup:
    """Decide how the processes of the run hold the model.

    Args:
        setup: Of the run.
        empty: The model without weights.

    Raises:
        InvalidConfiguration: The model cannot be spread over processes, though that is asked for.
    """
    world, memory, start = setup.world, setup.hardware.memory_bytes, setup.task.adapter_path
    chosen = choose_parallelism(
        setup.task.run,
        parameters=empty.num_parameters(),
        weight_bytes=setup.precision.weights.itemsize,
        # Nodes may have GPUs of other sizes, and all processes must decide the same.
        gpu_bytes=min(world.gather(memory)) if memory is not None else None,
        adapter=json.loads((start / "adapter_config.json").read_bytes()) if start is not None else None,
    )
    if chosen is None:
        return setup
    if world.is_first:
        print(f"{world.size} processes with {chosen}", flush=True)
    sharding = sharded_over(world.size, empty) if chosen.sharded else None
    return replace(setup, parallelism=chosen, sharding=sharding)


def token_files(setup: Setup, tokenize: Callable[[Path, str], TokenFile]) -> tuple[TokenFile, TokenFile | None]:
    """Return the tokenised training and validation rows; one process of each pod writes them for all of it.

    Args:
        setup: What the run needs besides rows and model.
        tokenize: Writes the token file of a file of rows, which are "training" or "validation" rows.
    """
    task = setup.task

    def make() -> tuple[TokenFile, TokenFile | None]:
        training = tokenize(task.train_path, "training")
        return training, tokenize(task.validation_path, "validation") if task.validation_path else None

    return setup.world.once_per_pod(make)


def load_start(setup: Setup, outputs: Sequence[str] | None = None) -> PreTrainedModel | PeftModel:
    """Load what training starts from: the base model, with the adapter that the run goes on from where there is one.

    Raises:
        InvalidModel: The base model cannot be loaded.
        InvalidAdapter: The adapter is another model's.
    """
    base = load_base(setup, outputs)
    if setup.task.adapter_path is None:
        return base
    return with_loaded_adapter(base, setup.task.adapter_path, setup.task.run.model.revision)


def load_base(setup: Setup, outputs: Sequence[str] | None = None) -> PreTrainedModel:
    """Load the base model to train it.

    Raises:
        InvalidModel: It cannot be loaded.
    """
    task, precision = setup.task, setup.precision
    # A head that the files do not have is drawn at random.
    set_seed(task.run.hyperparameters.seed)
    model = load_model(
        task.model_path,
        task.run,
        precision,
        weights=precision.weights,
        device=setup.hardware.device,
        outputs=outputs,
        sharding=setup.sharding,
    )
    if outputs is not None:
        # A classifier looks for the last token that is no padding.
        model.config.pad_token_id = setup.tokenizer.pad_token_id
    model.name_or_path = base_model_id(task.run)  # what the adapter names as its base, instead of a folder of this pod
    return model


def arguments(setup: Setup, *, evaluates: bool) -> dict[str, object]:
    """Return the arguments that all trainers have in common."""
    return common_arguments(
        setup.task.run,
        setup.precision,
        on_gpu=setup.hardware.on_gpu,
        scratch=setup.scratch / "trainer",
        evaluates=evaluates,
    )


def plan(setup: Setup, trainer: Trainer, rows: TokenFile) -> PlanEvent:
    """Return what is known before the first step."""
    total_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return plan_of(setup, cast("PreTrainedModel | PeftModel", trainer.model), total_steps, rows)


def plan_of(setup: Setup, model: PreTrainedModel | PeftModel, total_steps: int, rows: TokenFile) -> PlanEvent:
    """Return what is known of a model before the first of so many steps."""
    targets = None
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        # Prefix and prompt tuning have no target modules.
        named = getattr(model.peft_config["default"], "target_modules", None)
        targets = sorted(named) if named else None
    else:
        trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    return PlanEvent(
        total_steps=total_steps,
        dtype=setup.precision.name,
        trainable_parameters=trainable,
        total_parameters=total + packed_away(model),
        target_modules=targets,
        train_rows=rows.rows,
        dropped_rows=rows.dropped,
        cut_rows=rows.cut,
        parallelism=str(setup.parallelism) if setup.parallelism else None,
    )


def learn(
    setup: Setup,
    trainer: Trainer,
    train_rows: TokenFile,
    report: Report,
    *,
    probes: Sequence[list[int]],
    prompts: Sequence[samples.Prompt] = (),
    outputs: tuple[str, ...] | None = None,
) -> Trained | None:
    """Report the plan, train, evaluate before and after, write samples and result files, and record the probe.

    Answers, files and probe are the first process's alone; the others are done before that, and give None. Where all
    processes hold the model together, they answer, save and probe together.

    Args:
        setup: What the run needs besides rows and model.
        trainer: With the model that is saved afterwards; its evaluation rows, where it has any, are evaluated.
        train_rows: The rows that the trainer has, for the plan.
        report: Takes the events.
        probes: Tokenised rows that the saved files are compared on.
        prompts: Answered before and after; none for a model that writes no answers.
        outputs: Names of the outputs of a classification head; None: a language model.
    """
    report(plan(setup, trainer, train_rows))
    before = samples.base_answers(trainer.model, setup.tokenizer, prompts) if prompts and setup.takes_part else []
    setup.world.gather(None)  # not all load a model, or answer, in the time that a collective operation may take
    loss, seconds = fit(setup, trainer, report)
    if setup.sharding is None:
        setup.world.leave()
    if not setup.takes_part:
        return None
    tuned = trained_model(trainer)
    after = samples.answers(tuned, setup.tokenizer, prompts) if prompts else []
    result.save(setup, tuned, has_head=outputs is not None)
    if prompts and setup.world.is_first:
        result.save_samples(setup, samples.as_documents(prompts, before, after))
    probe = verify.record_probe(tuned, verify.probe_ids(probes))
    return Trained(probe, trainer.state.global_step, loss, seconds, outputs)


def fit(setup: Setup, trainer: Trainer, report: Report) -> tuple[float, float]:
    """Train; evaluate the base before and the result after it where there are validation rows.

    Returns:
        Mean training loss, and the seconds that training took.
    """
    evaluates = trainer.eval_dataset is not None
    trainer.remove_callback(PrinterCallback)
    if setup.world.size > 1 and setup.sharding is None:
        # Now, because an evaluation marks a model as prepared: a training after it would never exchange gradients.
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    if evaluates:
        trainer.evaluate()
    evaluation = setup.task.run.evaluation
    selection = Selection(evaluation, setup.scratch, report) if evaluates and evaluation.selects else None
    if selection is not None:
        trainer.add_callback(selection)
    report(StageEvent(stage="Training"))
    began = time.monotonic()
    # Evaluation and answers drew random numbers; dropout must not depend on whether they took place. All processes draw
    # the same, because the order of rows may be among it; only for GRPO, which draws answers, each one draws its own.
    own = setup.world.rank if setup.task.run.objective.type == "GRPO" else 0
    set_seed(setup.task.run.hyperparameters.seed + own)
    # The optimizer takes the parameters that it finds, which have to be this process's shares.
    let_go(cast("nn.Module", trainer.model))
    loss: float = trainer.train().training_loss
    seconds = time.monotonic() - began
    if selection is not None:
        selection.finish(trainer)
        trainer.remove_callback(selection)  # weights that are rounded below are no further candidate
    if not setup.trains_adapter:
        # Weights only, as they are saved: buffers such as rotary frequencies stay in float32 when a model is loaded.
        let_go(cast("PreTrainedModel", trainer.model))
        for weight in cast("PreTrainedModel", trainer.model).parameters():
            if setup.sharding is None:
                weight.data = weight.data.to(setup.result_dtype)
            else:
                share = local(weight.data)
                share.copy_(share.to(setup.result_dtype))
    if evaluates and not is_evaluated(trainer, setup):
        trainer.evaluate()
    return loss, seconds


def is_evaluated(trainer: Trainer, setup: Setup) -> bool:
    """Tell whether the weights as they are saved were evaluated: after the last step, and not rounded since."""
    return is_last_step_evaluated(trainer) and (setup.trains_adapter or setup.result_dtype == setup.precision.weights)


def trained_model(trainer: Trainer) -> PreTrainedModel | PeftModel:
    """Return the model as a user runs it, without the trainer's autocast."""
    model: PreTrainedModel | PeftModel = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return model


def versions() -> dict[str, str]:
    """Return the versions that shape a result."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _REPORTED_VERSIONS
    }
