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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.trainer.conftest import EXCHANGES, MakeTask, Train
from tests.trainer.test_worker_objectives import JUDGED, PAIRS
from tunewright_trainer.errors import InvalidAdapter
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


def test_the_chat_template_is_the_adapters(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """An adapter that learned with a template of its own goes on with that, unless another one is given."""
    from tunewright_trainer import recipe

    model = {"uri": "hf://tests/tiny", "dtype": "Float32", "chatTemplate": TEMPLATE}
    adapter = first(make_task, train, tmp_path, model=model, validation=None)
    assert recipe.prepare(continued(make_task, adapter), tmp_path).tokenizer.chat_template == TEMPLATE
    given = continued(make_task, adapter, model={**CONTINUED, "chatTemplate": "{{ messages }}"})
    assert recipe.prepare(given, tmp_path).tokenizer.chat_template == "{{ messages }}"


def test_an_adapter_of_another_model(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """Shapes, layers and tensors that do not fit are refused with the reason, as invalid input."""
    adapter = first(make_task, train, tmp_path, validation=None)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, reason in (
        ({"r": 8}, "size mismatch"),
        ({"target_modules": ["q_proj", "up_proj"]}, "up_proj|unexpected|missing"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(InvalidAdapter, match=rf"does not fit tests/tiny: .*({reason})"):
            train(continued(make_task, adapter))
