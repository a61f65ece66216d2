"""Going on from an adapter on a tiny random Llama: losses go on, references are right, and results reload."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments

from tests.trainer.conftest import EXCHANGES, Events, MakeTask, Train
from tests.trainer.test_worker_objectives import JUDGED, LABELLED, PAIRS
from tunewright_trainer import ppo, recipe
from tunewright_trainer.errors import InvalidAdapter, InvalidData
from tunewright_trainer.protocol import EvaluationEvent, PlanEvent, ResultEvent, StepEvent, WorkerTask

pytestmark = pytest.mark.timeout(300)

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
LORA = {"type": "LoRA", "lora": {"rank": 4, "dropout": 0.0, "targets": "Attention"}}
CONTINUED = {"uri": "hf://tests/tiny", "dtype": "Float32", "continueFrom": {"uri": "s3://models/first"}}
BEFORE, AFTER = EXCHANGES[:16], EXCHANGES[16:]


def first(make_task: MakeTask, train: Train, folder: Path, **changes: Any) -> Path:
    """Train an adapter and return its folder."""
    task = make_task(**{"method": LORA, "rows": BEFORE, "validation": AFTER, **changes})
    train(task)
    adapter = folder / "first"
    shutil.copytree(task.output_path / "adapter", adapter)
    shutil.rmtree(task.output_path)
    return adapter


def continued(make_task: MakeTask, adapter: Path, **changes: Any) -> WorkerTask:
    """Return a task that goes on from an adapter."""
    task = make_task(**{"model": CONTINUED, "rows": BEFORE, **changes})
    return task.model_copy(update={"adapter_path": adapter})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a saved adapter."""
    loaded: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return loaded


def test_sft_goes_on_where_it_ended(make_task: MakeTask, train: Train, tmp_path: Path, tiny: Path) -> None:
    """The loss starts where it ended, the adapter keeps its settings, and the result is one whole adapter."""
    task = make_task(method=LORA, rows=BEFORE, validation=AFTER, hyperparameters={"maxSteps": 12})
    ended = train(task).of(EvaluationEvent)[-1].loss
    adapter = tmp_path / "first"
    shutil.copytree(task.output_path / "adapter", adapter)
    shutil.rmtree(task.output_path)
    task = continued(make_task, adapter, validation=AFTER, hyperparameters={"maxSteps": 12, "learningRate": 0.005})
    events = train(task)
    evaluations = events.of(EvaluationEvent)
    assert evaluations[0].step == 0
    assert evaluations[0].loss == pytest.approx(ended, abs=1e-5)
    steps = [event.loss for event in events.of(StepEvent) if event.loss is not None]
    assert steps[-1] < steps[0]
    (result,) = events.of(ResultEvent)
    assert result.reload_max_difference < 1e-4
    before = json.loads((adapter / "adapter_config.json").read_text())
    after = json.loads((task.output_path / "adapter" / "adapter_config.json").read_text())
    assert {**after, "target_modules": sorted(after["target_modules"])} == {
        **before, "target_modules": sorted(before["target_modules"]),
    }  # fmt: skip
    assert weights(adapter).keys() == weights(task.output_path / "adapter").keys()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), task.output_path / "adapter").eval()
    probe = load_file(task.output_path / "probe.safetensors")
    with torch.inference_mode():
        logits = model(input_ids=probe["input_ids"]).logits[:, -1]
    assert (logits - probe["logits"]).abs().max().item() < 1e-4


@pytest.mark.parametrize(("objective", "rows"), [("DPO", PAIRS), ("KTO", JUDGED)])
@pytest.mark.parametrize("method", [{"type": "LoRA"}, {"type": "QLoRA", "quantization": {}}], ids=["LoRA", "QLoRA"])
def test_preferences_start_at_the_adapter(
    objective: str,
    rows: list[dict[str, Any]],
    method: dict[str, Any],
    make_task: MakeTask,
    train: Train,
    tmp_path: Path,
) -> None:
    """The reference is the adapter as it came: no margin at the first step, and log 2 for DPO. It is not saved."""
    adapter = first(make_task, train, tmp_path)
    row_format = "Preference" if objective == "DPO" else "UnpairedPreference"
    task = continued(make_task, adapter, rows=rows, row_format=row_format, objective={"type": objective}, method=method)
    events = train(task)
    losses = [event.loss for event in events.of(StepEvent) if event.loss is not None]
    assert losses[0] == pytest.approx(math.log(2) if objective == "DPO" else 0.5, abs=1e-3)
    assert losses[-1] < losses[0]
    (plan,) = events.of(PlanEvent)
    saved = weights(task.output_path / "adapter")
    assert saved.keys() == weights(adapter).keys()
    assert plan.trainable_parameters == sum(tensor.numel() for tensor in saved.values())
    assert any(not torch.equal(saved[name], old) for name, old in weights(adapter).items())
    assert sorted(path.name for path in (task.output_path / "adapter").iterdir() if path.is_dir()) == []
    samples = json.loads((task.output_path / "samples.json").read_text())
    assert len(samples) == 3
    (result,) = events.of(ResultEvent)
    assert result.reload_max_difference < (1e-4 if method["type"] == "LoRA" else 1e-2)


# The reference is added to a model whose tied modules peft has wrapped already; it ties the copies none the less.
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules were found")
def test_dora_and_saved_modules_go_on(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """What an adapter holds besides low-rank updates goes on as well, reference included."""
    settings = {"rank": 4, "useDora": True, "modulesToSave": ["lm_head"]}
    adapter = first(make_task, train, tmp_path, method={"type": "LoRA", "lora": settings})
    task = continued(make_task, adapter, rows=PAIRS, row_format="Preference", objective={"type": "DPO"})
    events = train(task)
    assert events.of(StepEvent)[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert events.of(ResultEvent)[0].reload_max_difference < 1e-4
    assert weights(task.output_path / "adapter").keys() == weights(adapter).keys()


def test_ia3_goes_on(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """IA3 as well."""
    adapter = first(make_task, train, tmp_path, method={"type": "IA3"})
    task = continued(make_task, adapter, method={"type": "IA3"})
    assert train(task).of(ResultEvent)[0].reload_max_difference < 1e-4
    changed = weights(task.output_path / "adapter")
    assert any(not torch.equal(changed[name], old) for name, old in weights(adapter).items())


PROMPTS = [
    {"prompt": f"What is {a} plus {b}?", "columns": json.dumps({"answer": a + b})} for a in range(4) for b in range(4)
]
REWARDS = {"rewards": [{"type": "Regex", "regex": {"pattern": "^ [a-z]"}}], "maxCompletionLength": 3}
LEARNING: dict[str, dict[str, Any]] = {"GRPO": {"generations": 8, "beta": 0.1}, "PPO": {"klCoefficient": 0.1}}


def rewarded(objective: str, **changes: Any) -> dict[str, Any]:
    """Return what a task on prompts has."""
    block = {**REWARDS, **LEARNING[objective]}
    steps = {"maxSteps": 3, "batchSize": 16, **changes.pop("hyperparameters", {})}
    return {
        "rows": PROMPTS,
        "row_format": "Prompts",
        "validation": PROMPTS[:2],
        "objective": {"type": objective, objective.lower(): block},
        "hyperparameters": steps,
        **changes,
    }


def kls(events: Events) -> list[float]:
    """Return the divergence from the reference at each step."""
    return [(event.metrics or {})["kl"] for event in events.of(StepEvent)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning")
@pytest.mark.parametrize("objective", LEARNING)
@pytest.mark.parametrize("method", [{"type": "LoRA"}, {"type": "QLoRA", "quantization": {}}], ids=["LoRA", "QLoRA"])
def test_rewards_go_on_from_sft(
    objective: str, method: dict[str, Any], make_task: MakeTask, train: Train, tmp_path: Path
) -> None:
    """The reference is the adapter as it came: no divergence at the first step, some at the last. It is not saved."""
    adapter = first(make_task, train, tmp_path, hyperparameters={"maxSteps": 8})
    task = continued(make_task, adapter, method=method, **rewarded(objective))
    events = train(task)
    divergence = kls(events)
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[-1] > 1e-4, divergence
    saved = weights(task.output_path / "adapter")
    assert saved.keys() == weights(adapter).keys()
    assert events.of(PlanEvent)[0].trainable_parameters == sum(tensor.numel() for tensor in saved.values())
    assert any(not torch.equal(saved[name], old) for name, old in weights(adapter).items())
    assert sorted(path.name for path in (task.output_path / "adapter").iterdir() if path.is_dir()) == []
    assert events.of(ResultEvent)[0].reload_max_difference < (1e-4 if method["type"] == "LoRA" else 1e-2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning")
@pytest.mark.parametrize("objective", LEARNING)
def test_rewards_go_on_where_they_ended(objective: str, make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """The first evaluation draws the answers of the last one before. PPO's value goes on as well."""
    task = make_task(method=LORA, **rewarded(objective))
    ended = train(task).of(EvaluationEvent)[-1].metrics or {}
    adapter = tmp_path / "first"
    shutil.copytree(task.output_path / "adapter", adapter)
    shutil.rmtree(task.output_path)
    task = continued(make_task, adapter, **rewarded(objective))
    if objective == "PPO":
        head = load_file(adapter / "value_head.safetensors")
        policy = recipe.load_start(recipe.prepare(task, tmp_path / "scratch"))
        assert isinstance(policy, PeftModel)
        given = ppo.load_value_head(adapter, policy)
        assert given is not None
        assert task.run.objective.ppo is not None
        learner = ppo.build_learner(policy, TrainingArguments(use_cpu=True), task.run.objective.ppo, 3, given)
        assert all(torch.equal(tensor, head[name]) for name, tensor in learner.model.value_head.state_dict().items())
    began = train(task).of(EvaluationEvent)[0].metrics or {}
    names = ["reward", "rewards/Regex/mean", "completions/mean_length"]
    assert {name: began[name] for name in names} == pytest.approx({name: ended[name] for name in names}, abs=1e-4)


def test_a_value_head_of_another_model(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """Shapes that do not fit are told before training."""
    adapter = first(make_task, train, tmp_path, validation=None)
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, adapter / "value_head.safetensors")
    with pytest.raises(InvalidAdapter, match=r"value_head.safetensors beside .* no value head of a model with .* 64"):
        train(continued(make_task, adapter, **rewarded("PPO")))


HEADS: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    "Reward": (PAIRS, "Preference", ["reward"]),
    "Classification": (LABELLED, "Labelled", ["bad", "good"]),
}


@pytest.mark.parametrize("objective", HEADS)
@pytest.mark.parametrize("method", [{"type": "LoRA"}, {"type": "QLoRA", "quantization": {}}], ids=["LoRA", "QLoRA"])
def test_heads_go_on_where_they_ended(
    objective: str, method: dict[str, Any], make_task: MakeTask, train: Train, tmp_path: Path
) -> None:
    """A score or a label is worth what it was: the head comes with the adapter, and is trained on."""
    rows, row_format, outputs = HEADS[objective]
    given: dict[str, Any] = {"rows": rows[:16], "validation": rows[16:], "row_format": row_format}
    steps = {"maxSteps": 6, "learningRate": 0.002}
    task = make_task(objective={"type": objective}, method=method, hyperparameters=steps, **given)
    ended = train(task).of(EvaluationEvent)[-1]
    adapter = tmp_path / "first"
    shutil.copytree(task.output_path / "adapter", adapter)
    shutil.rmtree(task.output_path)
    task = continued(make_task, adapter, objective={"type": objective}, method=method, hyperparameters=steps, **given)
    events = train(task.model_copy(update={"adapter_outputs": outputs}))
    evaluations = events.of(EvaluationEvent)
    assert evaluations[0].loss == pytest.approx(ended.loss, abs=1e-4 if method["type"] == "LoRA" else 1e-2)
    assert evaluations[-1].loss < evaluations[0].loss
    (result,) = events.of(ResultEvent)
    assert result.outputs == outputs
    assert result.reload_max_difference < (1e-4 if method["type"] == "LoRA" else 1e-2)
    head = "base_model.model.score.weight"
    saved, before = weights(task.output_path / "adapter"), weights(adapter)
    assert saved.keys() == before.keys()
    assert not torch.equal(saved[head], before[head])


def test_a_classifier_keeps_its_labels(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """Rows that have only some of the labels do not change what the outputs mean; other labels are refused."""
    given: dict[str, Any] = {"row_format": "Labelled", "objective": {"type": "Classification"}}
    adapter = first(make_task, train, tmp_path, rows=LABELLED, validation=None, **given)
    task = continued(make_task, adapter, **{**given, "rows": LABELLED[::2]})
    (result,) = train(task.model_copy(update={"adapter_outputs": ["bad", "good"]})).of(ResultEvent)
    assert result.outputs == ["bad", "good"]
    rows = [{"text": "Snow", "label": "odd"}]
    task = continued(make_task, adapter, **{**given, "rows": rows})
    with pytest.raises(InvalidData, match="training row 1: label 'odd' is not among bad, good"):
        train(task.model_copy(update={"adapter_outputs": ["bad", "good"]}))


def test_the_chat_template_is_the_adapters(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """An adapter that learned with a template of its own goes on with that, unless another one is given."""
    model = {"uri": "hf://tests/tiny", "dtype": "Float32", "chatTemplate": TEMPLATE}
    adapter = first(make_task, train, tmp_path, model=model, validation=None)
    assert recipe.prepare(continued(make_task, adapter), tmp_path).tokenizer.chat_template == TEMPLATE
    given = continued(make_task, adapter, model={**CONTINUED, "chatTemplate": "{{ messages }}"})
    assert recipe.prepare(given, tmp_path).tokenizer.chat_template == "{{ messages }}"


def test_an_adapter_of_another_model(make_task: MakeTask, train: Train, tmp_path: Path, tiny: Path) -> None:
    """Shapes, layers and tensors that do not fit are refused with the reason, before there is need for weights."""
    adapter = first(make_task, train, tmp_path, validation=None)
    empty = tmp_path / "without-weights"
    shutil.copytree(tiny, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, reason in (
        ({"r": 8}, "size mismatch"),
        ({"target_modules": ["q_proj", "up_proj"]}, "up_proj|unexpected|missing"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(InvalidAdapter, match=rf"does not fit tests/tiny: .*({reason})"):
            train(continued(make_task, adapter, model_path=empty))
