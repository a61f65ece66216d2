"""Real training in several processes, in a pod and in several pods: one result, and the losses of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.trainer.conftest import EXCHANGES, Events, MakeTask, task_maker
from tests.trainer.kit import WRITER, Bucket, bucket_run
from tests.trainer.pods import Pods, one_pod, two_pods
from tests.trainer.s3_fixtures import bucket, server, shared_bucket
from tests.trainer.test_worker_grpo import PROMPTS, WORD
from tests.trainer.test_worker_objectives import JUDGED, LABELLED, PAIRS
from tunewright_api.run_config import TrainRun
from tunewright_api.run_report import RunReport
from tunewright_trainer import worker
from tunewright_trainer.artifact import download_artifact
from tunewright_trainer.protocol import (
    EVENTS_FILE,
    EvaluationEvent,
    PlanEvent,
    ResultEvent,
    StepEvent,
    parse_event,
    write_task,
)
from tunewright_trainer.result import round_adapter
from tunewright_trainer.storage import Storage

__all__ = ["bucket", "server", "shared_bucket"]

pytestmark = pytest.mark.timeout(600)

LOSS_TOLERANCE = 1e-4
"""Sums in another order; replicas that exchange no gradients, or see other rows, are off by 2e-3 and more."""
HALF_TOLERANCE = 0.005
"""Products in bfloat16 have three digits."""
WORKER = (sys.executable, "-m", "tunewright_trainer.worker")
LORA = {"type": "LoRA", "lora": {"dropout": 0.0}}
"""What is dropped depends on the number of processes, so losses are equal only without."""
VALIDATION = EXCHANGES[:8]
STEPS = {"maxSteps": 4, "batchSize": 2, "learningRate": 0.002, "maxSequenceLength": 128}
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "Full"}, "validation": VALIDATION, "hyperparameters": {"gradientCheckpointing": True}},
    "packing": {"method": LORA, "hyperparameters": {"packing": True, "batchSize": 1, "maxSequenceLength": 64}},
    "qlora": {"method": {**LORA, "type": "QLoRA", "quantization": {"bits": 4}}},
    "dpo": {
        "rows": PAIRS,
        "validation": PAIRS[:4],
        "row_format": "Preference",
        "objective": {"type": "DPO"},
        "method": LORA,
    },
    "kto": {"rows": JUDGED, "row_format": "UnpairedPreference", "objective": {"type": "KTO"}, "method": LORA},
    "reward": {"rows": PAIRS, "row_format": "Preference", "objective": {"type": "Reward"}, "method": LORA},
    "classification": {
        "rows": LABELLED,
        "validation": LABELLED[:8],
        "row_format": "Labelled",
        "objective": {"type": "Classification"},
        "method": {"type": "Full"},
        "evaluation": {"strategy": "Steps", "steps": 1, "loadBest": True, "metric": "F1"},
    },
}
GRPO = {
    "rows": PROMPTS[:1] * 16,
    "row_format": "Prompts",
    "objective": {"type": "GRPO", "grpo": {"rewards": [WORD], "generations": 8, "maxCompletionLength": 1}},
    "method": LORA,
    "hyperparameters": {"batchSize": 8, "maxSteps": 10},
}
"""Each process answers the same prompt 8 times a step; an answer is rewarded by 0 or 1."""


ONLY_SPREAD: dict[str, dict[str, Any]] = {
    "lora": {
        "method": LORA,
        "validation": VALIDATION,
        "evaluation": {"strategy": "Steps", "steps": 1, "loadBest": True},
        "hyperparameters": {"gradientCheckpointing": True},
    },
    "half": {"method": {"type": "Full"}, "model": {"uri": "hf://tests/tiny", "dtype": "BFloat16"}},
    "reference": {
        "rows": PAIRS,
        "row_format": "Preference",
        "objective": {"type": "DPO"},
        "method": {"type": "Full"},
        "hyperparameters": {"learningRate": 0.0002},
    },
    "ia3": {"method": {"type": "IA3"}},
    "coarse": {
        "rows": LABELLED,
        "row_format": "Labelled",
        "objective": {"type": "Classification"},
        "method": {**LORA, "type": "QLoRA", "quantization": {"type": "FP4", "doubleQuant": False}},
        "hyperparameters": {"gradientCheckpointing": True},
    },
    "continued": {
        "model": {"uri": "hf://tests/tiny", "dtype": "Float32", "continueFrom": {"uri": "s3://models/first"}},
        "rows": PAIRS,
        "row_format": "Preference",
        "objective": {"type": "DPO"},
        "method": {"type": "QLoRA", "quantization": {"bits": 4}},
    },
    "stopped": {
        "method": LORA,
        "validation": VALIDATION,
        "evaluation": {"strategy": "Steps", "steps": 1, "earlyStopping": {"patience": 2, "minDelta": 10}},
    },
}
SPREAD = {
    **ONLY_SPREAD,
    **{name: CASES[name] for name in ("full", "packing", "qlora", "kto", "reward", "classification")},
}
"""Cases that are trained with FSDP."""
_NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
QUANTIZED = {
    "qlora": _NF4,
    "continued": _NF4,
    "coarse": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
}
"""How the bases of these cases are quantized."""


def scaled(make_task: MakeTask, processes: int, case: dict[str, Any], parallelism: str = "DDP") -> Any:
    """Return a task for so many processes; one process takes their batches one after the other instead."""
    given = {**STEPS, "gradientAccumulationSteps": 2 // processes, **case.get("hyperparameters", {})}
    task = make_task(**{**case, "hyperparameters": given})
    scale = {"processes": processes, "parallelism": parallelism}
    start = first_adapter(task.model_path) if task.run.model.continue_from is not None else None
    return task.model_copy(update={"run": task.run.model_copy(update=scale), "adapter_path": start})


@cache
def first_adapter(base: Path) -> Path:
    """Write an adapter with random weights, to go on from."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    model.save_pretrained(base.parent / "first", save_embedding_layers=False)
    return base.parent / "first"


def alone(tiny: Path, folder: Path, case: dict[str, Any]) -> Events:
    """Train in this process and return what was reported."""
    folder.mkdir()
    task = scaled(task_maker(tiny, folder), 1, case)
    events = Events()
    worker.recipe_of(task)(task, events.append, folder / "scratch")
    return events


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes work, on each case in a folder of its own."""
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def together(tiny: Path, folder: Path) -> dict[str, Events]:
    """What two processes report of all cases."""
    top = folder
    tasks = {name: ("DDP", case) for name, case in {**CASES, "grpo": GRPO}.items()}
    tasks |= {f"fsdp-{name}": ("FSDP", case) for name, case in SPREAD.items()}
    for name, (parallelism, case) in tasks.items():
        (top / name).mkdir()
        write_task(top / name, scaled(task_maker(tiny, top / name), 2, case, parallelism))
    launch = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--log-dir=/dev/null", "--module"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "tests.trainer.together"]
    done = subprocess.run([*command, *(str(top / name) for name in tasks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    lines = {name: (top / name / EVENTS_FILE).read_text().splitlines() for name in tasks}
    return {name: Events(map(parse_event, of_case)) for name, of_case in lines.items()}


@pytest.fixture(scope="module")
def folder_of_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process works, on each case in a folder of its own."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def by_one(tiny: Path, folder_of_one: Path) -> Callable[[str], Events]:
    """What one process reports of a case, trained once."""
    return cache(lambda case: alone(tiny, folder_of_one / case, {**CASES, **SPREAD}[case]))


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_one_process(
    case: str, together: dict[str, Events], by_one: Callable[[str], Events]
) -> None:
    """Two processes train as one that accumulates twice as many batches: same rows, gradients and evaluations."""
    check_same(case, together[case], by_one(case))
    assert plan_of(together[case]) == "DDP: resources.parallelism says so"


@pytest.mark.parametrize("case", SPREAD)
def test_losses_of_a_spread_model_equal_those_of_one_process(
    case: str, together: dict[str, Events], by_one: Callable[[str], Events], folder: Path, folder_of_one: Path
) -> None:
    """Two processes that hold half of each weight train like one that holds all of them, and choose the same best."""
    check_same(case, together[f"fsdp-{case}"], by_one(case))
    assert plan_of(together[f"fsdp-{case}"]) == "FSDP: resources.parallelism says so"
    for rank in range(2):
        held = json.loads((folder / f"fsdp-{case}" / f"held-{rank}.json").read_text())
        assert (held["whole"], held["held"]) == (0, pytest.approx(held["all"] / 2, abs=64))
    ours, theirs = (
        load_file(path / "output" / "probe.safetensors")["logits"]
        for path in (folder / f"fsdp-{case}", folder_of_one / case)
    )
    torch.testing.assert_close(ours, theirs, atol=0.05 if case == "half" else 2e-3, rtol=0)


def check_same(case: str, ours: Events, theirs: Events) -> None:
    """Compare the training in two processes with that in one."""
    tolerance = HALF_TOLERANCE if case == "half" else LOSS_TOLERANCE
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=tolerance)
    assert len(ours.of(StepEvent)) == (3 if case == "stopped" else 4)
    of_both = [(plan.trainable_parameters, plan.total_parameters) for plan in ours.of(PlanEvent) + theirs.of(PlanEvent)]
    assert of_both[0] == of_both[1]
    assert len(ours.of(ResultEvent)) == 1
    assert [type(event) for event in ours] == [type(event) for event in theirs]


def plan_of(events: Events) -> str | None:
    """Return how the model was held."""
    return events.of(PlanEvent)[0].parallelism


@pytest.mark.parametrize("case", SPREAD)
def test_the_result_of_a_spread_model_is_an_ordinary_one(
    case: str, together: dict[str, Events], folder: Path, tiny: Path
) -> None:
    """What two processes held and saved loads in one, with plain transformers and peft, to the recorded logits."""
    assert together[f"fsdp-{case}"].of(ResultEvent)
    output = folder / f"fsdp-{case}" / "output"
    outputs = {"reward": 1, "classification": 2, "coarse": 2}.get(case)
    kind: Any = AutoModelForCausalLM if outputs is None else AutoModelForSequenceClassification
    head = {} if outputs is None else {"num_labels": outputs, "pad_token_id": 2}
    if (output / "model").is_dir():
        config = json.loads((output / "model" / "config.json").read_text())
        assert config["dtype"] == ("bfloat16" if case == "half" else "float32")
        assert "distributed_config" not in config
        model = kind.from_pretrained(output / "model", dtype=torch.float32)
    else:
        base = kind.from_pretrained(tiny, dtype=torch.float32, quantization_config=QUANTIZED.get(case), **head)
        model = PeftModel.from_pretrained(base, output / "adapter")
    if case in QUANTIZED:
        round_adapter(model)  # TRL trains it in bfloat16
    probe = load_file(output / "probe.safetensors")
    ids = probe["input_ids"]
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    found = logits if outputs is not None else logits[:, -1]
    torch.testing.assert_close(found, probe["logits"], atol=1e-4, rtol=0)


def test_a_classifiers_loss_is_a_mean(tiny: Path, tmp_path: Path) -> None:
    """Accumulated batches train a classifier like one batch of their size; its loss is not their sum."""
    accumulated = alone(tiny, tmp_path / "2 x 2", CASES["classification"])
    at_once = {**CASES["classification"], "hyperparameters": {"batchSize": 4, "gradientAccumulationSteps": 1}}
    whole = alone(tiny, tmp_path / "4", at_once)
    assert losses_of(accumulated)[:4] == pytest.approx(losses_of(whole)[:4], abs=LOSS_TOLERANCE)


def losses_of(events: Events) -> list[float | None]:
    """Return the losses of all steps, then those of all evaluations."""
    return [event.loss for event in events.of(StepEvent)] + [event.loss for event in events.of(EvaluationEvent)]


def test_processes_answer_differently(together: dict[str, Events]) -> None:
    """GRPO: each process draws answers of its own; of equal ones an even number would be rewarded in every step."""
    events = together["grpo"]
    rewarded = [16 * (step.metrics or {})["reward"] for step in events.of(StepEvent)]
    assert len(rewarded) == 10
    assert [round(count) for count in rewarded] == pytest.approx(rewarded)
    assert any(round(count) % 2 for count in rewarded), rewarded
    assert len(events.of(ResultEvent)) == 1


@pytest.fixture(scope="module")
def sft_losses(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    """Losses of the LoRA run in one process."""
    events = alone(tiny, tmp_path_factory.mktemp("sft") / "alone", {"method": LORA, "validation": VALIDATION})
    return [event.loss for event in events.of(StepEvent)]


@pytest.fixture
def inputs(bucket: Bucket, tiny: Path) -> Bucket:
    """A bucket with the tiny model and rows."""
    for path in tiny.iterdir():
        bucket.put(f"base/{path.name}", path.read_bytes())
    for name, rows in {"train": EXCHANGES, "validation": VALIDATION}.items():
        bucket.put(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return bucket


def sft_run(bucket: Bucket) -> TrainRun:
    """Return the LoRA run on the inputs of a bucket."""
    return bucket_run(
        bucket,
        model={"uri": f"s3://{bucket.name}/base", "dtype": "Float32"},
        dataset={kind: [{"uri": f"s3://{bucket.name}/{kind}.jsonl"}] for kind in ("train", "validation")},
        method=LORA,
        hyperparameters={**STEPS, "gradientAccumulationSteps": 1},
    )


def check_result(inputs: Bucket, report: RunReport, losses: list[float | None], folder: Path) -> None:
    """Compare a published result with the training in one process, and verify its files."""
    assert report.reason == "Succeeded", report.message
    own = f"out/{report.run_key}/{WRITER}"
    body = inputs.client.get_object(Bucket=inputs.name, Key=f"{own}/metrics.jsonl")["Body"].read()
    lines = [json.loads(line) for line in body.splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert report.output is not None
    download_artifact(report.output.uri, folder, Storage(bucket_run(inputs).storage))
    assert (folder / "adapter_model.safetensors").is_file()
    assert {f"{own}/samples.json", f"{own}/probe.safetensors"} <= set(inputs.stored(own))


def test_two_processes_publish_one_result(inputs: Bucket, tmp_path: Path, sft_losses: list[float | None]) -> None:
    """A pod with two training processes publishes what one process would have trained to."""
    (report,) = Pods(one_pod(sft_run(inputs)), tmp_path, WORKER).reports_of_all()
    check_result(inputs, report, sft_losses, tmp_path / "got")


@pytest.mark.parametrize("parallelism", ["DDP", "FSDP"])
def test_two_pods_publish_one_result(
    parallelism: str, inputs: Bucket, tmp_path: Path, sft_losses: list[float | None]
) -> None:
    """Of two pods the first one publishes; the other says that it took part, and stores nothing."""
    run = sft_run(inputs).model_copy(update={"parallelism": parallelism})
    first, second = Pods(two_pods(run), tmp_path, WORKER).reports_of_all()
    assert first.plan is not None
    assert first.plan.parallelism == f"{parallelism}: resources.parallelism says so"
    check_result(inputs, first, sft_losses, tmp_path / "got")
    assert (second.exit_code, second.reason, second.stage, second.output) == (0, "TookPart", "Finished", None)
    assert second.run_key == first.run_key
    assert sum(key.endswith("run.json") for key in inputs.stored("out")) == 1
