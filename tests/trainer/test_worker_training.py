"""The recipe on a tiny random Llama: pinned losses, published files, and runs that must fail."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.trainer.conftest import EXCHANGES, Events, MakeTask, Train
from tests.trainer.plain_trl import losses_of_plain_trl
from tunewright_trainer.errors import Diverged, InvalidData, InvalidModel, VerificationFailed
from tunewright_trainer.protocol import EvaluationEvent, PlanEvent, ResultEvent, StageEvent, StepEvent

pytestmark = pytest.mark.timeout(300)

LOSS_TOLERANCE = 2e-3
"""Other CPUs add in another order; a wrong mask, seed or schedule moves these losses by 1e-2 and more."""

NF4 = {"type": "QLoRA", "lora": {"dropout": 0.0}, "quantization": {"bits": 4}}
INT8 = {"type": "QLoRA", "lora": {"dropout": 0.0}, "quantization": {"bits": 8}}
PINNED: dict[str, tuple[dict[str, Any], list[float]]] = {
    "lora": ({"method": {"type": "LoRA"}}, [10.8168, 10.8590, 10.6226, 10.4569]),
    "lora without dropout, checkpointing": (
        {
            "method": {"type": "LoRA", "lora": {"dropout": 0.0}},
            "hyperparameters": {"gradientCheckpointing": True},
        },
        [10.8168, 10.8590, 10.6246, 10.4597],
    ),
    "lora, packing": (
        {"method": {"type": "LoRA"}, "hyperparameters": {"packing": True, "batchSize": 1}},
        [10.8330, 10.8782, 10.6121, 10.4572],
    ),
    "lora, accumulation, linear": (
        {
            "method": {"type": "LoRA"},
            "hyperparameters": {"batchSize": 2, "gradientAccumulationSteps": 2, "scheduler": "Linear"},
        },
        [10.8168, 10.8590, 10.6219, 10.4657],
    ),
    "qlora nf4": ({"method": NF4}, [10.8137, 10.8571, 10.6067, 10.4527]),
    "qlora int8": ({"method": INT8}, [10.8163, 10.8588, 10.6256, 10.4596]),
    "full": ({"method": {"type": "Full"}}, [10.8168, 10.8590, 10.2011, 9.2585]),
    "full, adafactor": (
        {"method": {"type": "Full"}, "hyperparameters": {"optimizer": "Adafactor"}},
        [10.8168, 10.8590, 10.2911, 9.3666],
    ),
}


@pytest.mark.parametrize("case", PINNED)
def test_fixed_seed_gives_pinned_losses(case: str, make_task: MakeTask, train: Train) -> None:
    """Every method trains to the recorded losses, step by step."""
    changes, expected = PINNED[case]
    events = train(make_task(**changes))
    losses = [event.loss for event in events.of(StepEvent)]
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE), [round(x or 0, 4) for x in losses]


def test_losses_equal_those_of_plain_trl(make_task: MakeTask, train: Train, tiny: Path, tmp_path: Path) -> None:
    """The recipe adds nothing to the arithmetic: TRL on the same chats, with its own masking, gives the same losses."""
    from trl import SFTConfig, SFTTrainer

    events = train(make_task(method={"type": "LoRA", "lora": {"dropout": 0.0}}))
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in EXCHANGES
    ]
    theirs = losses_of_plain_trl(SFTTrainer, SFTConfig, rows, tiny, tmp_path)
    assert [event.loss for event in events.of(StepEvent)] == pytest.approx(theirs, abs=1e-6)


def test_events_tell_the_run(make_task: MakeTask, train: Train) -> None:
    """Plan, stages, steps and evaluations come in the order of the run, with the numbers a user sees."""
    task = make_task(
        hyperparameters={"maxSteps": 3, "batchSize": 2},
        validation=EXCHANGES[:4],
        evaluation={"strategy": "Steps", "steps": 2},
    )
    events = train(task)
    (plan,) = events.of(PlanEvent)
    assert (plan.total_steps, plan.train_rows, plan.dropped_rows, plan.dtype) == (3, len(EXCHANGES), 0, "Float32")
    assert plan.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert plan.trainable_parameters == 2 * 16 * (4 * (64 + 64) + 3 * (64 + 128))
    assert [(e.stage, e.message) for e in events.of(StageEvent)] == [
        ("Loading", None), ("Evaluating", None), ("Training", None), ("Evaluating", None), ("Training", None),
        ("Evaluating", None), ("Verifying", None),
    ]  # fmt: skip
    evaluations = events.of(EvaluationEvent)
    assert [e.step for e in evaluations] == [0, 2, 3]
    assert evaluations[-1].loss < evaluations[0].loss
    steps = events.of(StepEvent)
    assert [e.step for e in steps] == [1, 2, 3]
    assert all(e.grad_norm and e.tokens_per_second and e.learning_rate is not None for e in steps)
    assert [e.tokens for e in steps] == sorted({e.tokens or 0 for e in steps})
    assert isinstance(events[-1], ResultEvent)


@pytest.mark.parametrize("method", [{"type": "LoRA"}, NF4], ids=["lora", "qlora nf4"])
def test_evaluation_does_not_change_the_training(method: dict[str, Any], make_task: MakeTask, train: Train) -> None:
    """The same numbers are drawn, and the same weights are trained, whether or not the base model was evaluated."""
    without = train(make_task(method=method))
    evaluated = train(make_task(method=method, validation=EXCHANGES[:4]))
    assert [e.loss for e in without.of(StepEvent)] == [e.loss for e in evaluated.of(StepEvent)]


def test_adapter_loads_with_plain_peft(make_task: MakeTask, train: Train, tiny: Path) -> None:
    """The published files and nothing else give the recorded logits, name the user's base, and hold no pickle."""
    task = make_task(model={"uri": "hf://tests/tiny", "revision": "v1", "dtype": "Float32"})
    (result,) = train(task).of(ResultEvent)
    adapter = task.output_path / "adapter"
    assert (result.kind, result.root, result.steps, result.reload_max_difference) == ("Adapter", "adapter", 4, 0.0)
    assert files_below(task.output_path) == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/chat_template.jinja",
        "adapter/tokenizer.json", "adapter/tokenizer_config.json", "probe.safetensors", "samples.json",
    }  # fmt: skip
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tests/tiny", "v1")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert logit_difference(base, task.output_path) > 0.01
    assert logit_difference(PeftModel.from_pretrained(base, adapter), task.output_path) < 1e-4


def test_full_model_is_saved_in_the_format_asked_for(make_task: MakeTask, train: Train) -> None:
    """Full fine-tuning to BFloat16 publishes bfloat16 weights, evaluated and verified as such."""
    task = make_task(
        model={"uri": "hf://tests/tiny", "dtype": "BFloat16"},
        method={"type": "Full"},
        validation=EXCHANGES[:4],
        hyperparameters={"maxSteps": 2},
    )
    events = train(task)
    (result,) = events.of(ResultEvent)
    assert (result.kind, result.root) == ("Model", "model")
    assert [e.step for e in events.of(EvaluationEvent)] == [0, 2, 2], "the last one is of the rounded weights"
    weights = load_file(task.output_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(task.output_path / "model", dtype=torch.bfloat16)
    assert logit_difference(model, task.output_path) < 0.01, "one rounding step of bfloat16 is 0.004"
    with safe_open(task.output_path / "probe.safetensors", "pt") as probe:
        assert probe.metadata() == {"dtype": "BFloat16"}


def test_quantized_adapter_is_verified(make_task: MakeTask, train: Train) -> None:
    """An adapter on a 4-bit base reloads with equal logits."""
    (result,) = train(make_task(method=NF4, hyperparameters={"maxSteps": 2})).of(ResultEvent)
    assert result.reload_max_difference == 0.0


def test_samples_show_base_and_tuned(make_task: MakeTask, train: Train) -> None:
    """samples.json holds validation prompts with the expected, the base's and the tuned answer."""
    rows = [{"prompt": row["prompt"], "completion": "Yes."} for row in EXCHANGES]
    task = make_task(rows=rows, validation=rows[4:10], method={"type": "Full"}, hyperparameters={"maxSteps": 20})
    train(task)
    samples = json.loads((task.output_path / "samples.json").read_text())
    assert [s["prompt"] for s in samples] == [row["prompt"] for row in EXCHANGES[4:7]]
    assert [s["expected"] for s in samples] == ["Yes."] * 3
    assert all(s["tuned"].startswith("Yes") for s in samples)
    assert not any("Yes" in s["base"] for s in samples)


def test_chat_template_of_the_spec_is_used_and_saved(make_task: MakeTask, train: Train) -> None:
    """model.chatTemplate shapes the rows and goes out with the adapter."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    task = make_task(
        model={"uri": "hf://tests/tiny", "dtype": "Float32", "chatTemplate": template}, hyperparameters={"maxSteps": 1}
    )
    train(task)
    assert (task.output_path / "adapter" / "chat_template.jinja").read_text() == template
    probe = load_file(task.output_path / "probe.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(task.output_path / "adapter")
    assert str(tokenizer.decode(probe["input_ids"][0])).startswith("<user>What is ")


def test_dropped_rows_are_counted(make_task: MakeTask, train: Train) -> None:
    """Rows whose answer lies beyond the limit are left out and reported."""
    long = {"prompt": "word " * 200, "completion": "never seen"}
    (plan,) = train(make_task(rows=[*EXCHANGES, long, long], hyperparameters={"maxSteps": 1})).of(PlanEvent)
    assert (plan.train_rows, plan.dropped_rows) == (len(EXCHANGES), 2)


def test_nothing_to_learn_is_refused(make_task: MakeTask, train: Train) -> None:
    """When every row is dropped, the message gives the numbers and the field to raise."""
    long = {"prompt": "word " * 200, "completion": "never seen"}
    expected = r"none of the 2 training rows has a token to learn: 2 were cut at 128.*maxSequenceLength"
    with pytest.raises(InvalidData, match=expected):
        train(make_task(rows=[long, long]))


def test_nan_loss_ends_the_run(make_task: MakeTask, train: Train, tiny: Path, tmp_path: Path) -> None:
    """A loss that is no number is reported with its step and ends the run as diverged."""
    broken = copy_model(tiny, tmp_path / "broken", "model.norm.weight", math.nan)
    events = Events()
    with pytest.raises(Diverged, match="training loss at step 1 is nan"):
        train(make_task(model_path=broken), events)
    (step,) = events.of(StepEvent)
    assert step.step == 1
    assert math.isnan(step.loss or 0)


def test_damaged_weights_are_refused(make_task: MakeTask, train: Train, tiny: Path, tmp_path: Path) -> None:
    """A weights file that ends early is the model's fault, said so."""
    broken = copy_model(tiny, tmp_path / "broken", "model.norm.weight", 1.0)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidModel, match="hf://tests/tiny cannot be loaded"):
        train(make_task(model_path=broken))


def test_files_that_are_not_the_model_are_not_published(
    make_task: MakeTask, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the saved adapter is not what was trained, the run fails and says by how much."""
    from tunewright_trainer import recipe, result

    save = result.save

    def save_wrong(setup: recipe.Setup, model: PeftModel, *, has_head: bool) -> None:
        save(setup, model, has_head=has_head)
        path = setup.result_path / "adapter_model.safetensors"
        save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})

    monkeypatch.setattr(result, "save", save_wrong)
    with pytest.raises(VerificationFailed, match=r"largest difference 0\.\d+, allowed 0\.0001"):
        train(make_task())


@pytest.mark.parametrize("stateful", [False, True], ids=["in rows", "end to end"])
def test_packing_keeps_rows_apart(
    stateful: bool, make_task: MakeTask, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in one sequence do not see each other: one step over all rows has the same loss and as many tokens, packed
    or not, and so it has in the layout that models with a state get."""
    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", stateful)
    method = {"type": "LoRA", "lora": {"dropout": 0.0}}
    one_step = {"maxSteps": 1, "batchSize": len(EXCHANGES), "maxSequenceLength": 512}
    plain = train(make_task(method=method, hyperparameters=one_step))
    packed = train(make_task(method=method, hyperparameters={**one_step, "packing": True}))
    first, second = plain.of(StepEvent)[0], packed.of(StepEvent)[0]
    assert first.loss == pytest.approx(second.loss, abs=1e-4)
    assert first.tokens == second.tokens


def files_below(folder: Path) -> set[str]:
    """Return the files of a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def copy_model(source: Path, target: Path, name: str, value: float) -> Path:
    """Copy a model with one tensor filled with a value."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logit_difference(model: Any, output: Path) -> float:
    """Return how far a model's logits are from those in probe.safetensors."""
    probe = load_file(output / "probe.safetensors")
    assert probe["input_ids"].dtype == torch.int64
    assert probe["logits"].dtype == torch.float32
    with torch.no_grad():
        logits_BV = model.eval()(probe["input_ids"]).logits[:, -1].float()
    return float((logits_BV - probe["logits"]).abs().max())
