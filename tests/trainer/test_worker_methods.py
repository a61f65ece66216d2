"""The methods besides plain LoRA: every one trains, saves and reloads to the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.trainer.conftest import EXCHANGES, MakeTask, Train
from tunewright_trainer.errors import InvalidConfiguration, InvalidModel
from tunewright_trainer.protocol import EvaluationEvent, PlanEvent, StepEvent

pytestmark = pytest.mark.timeout(300)

LOSS_TOLERANCE = 2e-3
METHODS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "rslora": ({"type": "LoRA", "lora": {"useRslora": True, "dropout": 0.0}}, [10.8168, 10.8590, 10.9186, 10.4683]),
    "dora": ({"type": "LoRA", "lora": {"useDora": True, "dropout": 0.0}}, [10.8168, 10.8590, 10.6229, 10.4639]),
    "bias": ({"type": "LoRA", "lora": {"bias": "All", "dropout": 0.0}}, [10.8168, 10.8590, 10.6246, 10.4597]),
    "head": (
        {"type": "LoRA", "lora": {"modulesToSave": ["embed_tokens"], "dropout": 0.0}},
        [10.8168, 10.8590, 10.3962, 9.3691],
    ),
    "fp4": (
        {"type": "QLoRA", "quantization": {"type": "FP4", "doubleQuant": False}, "lora": {"dropout": 0.0}},
        [10.8145, 10.8586, 10.6244, 10.4661],
    ),
    "prefix": ({"type": "PrefixTuning", "prefixTuning": {"virtualTokens": 6}}, [10.7523, 10.7848, 10.7766, 10.7718]),
    "projected prefix": (
        {"type": "PrefixTuning", "prefixTuning": {"virtualTokens": 6, "projection": True}},
        [10.8229, 10.8516, 10.7011, 10.6440],
    ),
    "random prompt": (
        {"type": "PromptTuning", "promptTuning": {"virtualTokens": 6}},
        [10.8005, 10.8445, 10.8142, 10.8087],
    ),
    "text prompt": (
        {"type": "PromptTuning", "promptTuning": {"virtualTokens": 6, "initText": "Add the two numbers:"}},
        [10.8124, 10.8573, 10.7787, 10.7498],
    ),
    "ia3": ({"type": "IA3"}, [10.8168, 10.8590, 10.8205, 10.8188]),
    "ia3 by name": (
        {"type": "IA3", "ia3": {"targetModules": ["k_proj", "up_proj"]}},
        [10.8168, 10.8590, 10.8227, 10.8227],
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods_train_and_reload(case: str, make_task: MakeTask, train: Train, tiny: Path) -> None:
    """Losses are those recorded, the adapter is small, and plain peft loads it to the trained logits."""
    method, expected = METHODS[case]
    task = make_task(method=method, validation=EXCHANGES[:4])
    events = train(task)
    losses = [event.loss for event in events.of(StepEvent)]
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE), [round(x or 0, 4) for x in losses]
    (plan,) = events.of(PlanEvent)
    assert 0 < plan.trainable_parameters < plan.total_parameters
    evaluations = events.of(EvaluationEvent)
    assert evaluations[-1].loss != evaluations[0].loss
    if method["type"] == "QLoRA":
        return  # the worker's own check covers it; a float32 base gives other logits
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, task.output_path / "adapter").eval()
    probe = load_file(task.output_path / "probe.safetensors")
    with torch.inference_mode():
        logits = model(input_ids=probe["input_ids"]).logits[:, -1]
    assert (logits - probe["logits"]).abs().max().item() < 1e-4


def test_tied_embeddings_stay_tied(make_task: MakeTask, train: Train) -> None:
    """Saving the embedding of a model whose head is the same tensor trains it once."""
    task = make_task(method={"type": "LoRA", "lora": {"modulesToSave": ["embed_tokens"], "rank": 4}})
    (plan,) = train(task).of(PlanEvent)
    config = json.loads((task.output_path / "adapter" / "adapter_config.json").read_text())
    assert "embed_tokens" in config["modules_to_save"]
    assert plan.trainable_parameters < 2 * 49152 * 64


BAD = {
    "unknown target": (
        {"type": "LoRA", "lora": {"targetModules": ["q_proj", "v_porj"]}},
        r"lora\.targetModules names v_porj, .*did you mean v_proj\?\): the model has down_proj, gate_proj, k_proj, "
        r"o_proj, q_proj, up_proj, v_proj;",
    ),
    "rank": ({"type": "LoRA", "lora": {"rank": 256}}, r"lora\.rank is 256, but .* has only 64 .* at most 64"),
    "saved module": (
        {"type": "LoRA", "lora": {"modulesToSave": ["lm_hed"]}},
        r"lora\.modulesToSave names lm_hed, .*did you mean lm_head\?",
    ),
    "ia3 target": (
        {"type": "IA3", "ia3": {"targetModules": ["key_proj"]}},
        r"ia3\.targetModules names key_proj, .*did you mean k_proj\?",
    ),
}


@pytest.mark.parametrize(("case", "objective"), [*((case, "SFT") for case in BAD), ("rank", "Reward")])
def test_bad_settings(case: str, objective: str, make_task: MakeTask, train: Train, without_weights: Path) -> None:
    """What does not fit the model is refused with what would, before there is need for weights."""
    method, message = BAD[case]
    with pytest.raises(InvalidConfiguration, match=message):
        train(make_task(method=method, objective={"type": objective}, model_path=without_weights))


def test_a_tokenizer_of_another_model(make_task: MakeTask, train: Train, without_weights: Path) -> None:
    """More tokens than embeddings are told before there is need for weights."""
    config = json.loads((without_weights / "config.json").read_text())
    (without_weights / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(InvalidModel, match=r"the tokenizer has 49152 tokens, the model only 100 embeddings: the files"):
        train(make_task(model_path=without_weights))


def test_an_architecture_that_is_not_known(make_task: MakeTask, train: Train, without_weights: Path) -> None:
    """The message names the model; nothing was loaded."""
    (without_weights / "config.json").write_text('{"model_type": "perceptron"}')
    with pytest.raises(InvalidModel, match=r"hf://tests/tiny cannot be loaded: .*perceptron"):
        train(make_task(model_path=without_weights))


@pytest.fixture
def without_weights(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model without its weights: whoever would load them fails in another way."""
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder
