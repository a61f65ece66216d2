"""QLoRA on base models whose files are quantized already."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from tests.trainer.conftest import MakeTask, Train
from tunewright_trainer.errors import InvalidConfiguration, InvalidModel
from tunewright_trainer.protocol import ResultEvent, StepEvent

FLOAT32 = {"uri": "hf://tests/tiny", "dtype": "Float32"}
STORED: dict[str, tuple[BitsAndBytesConfig, dict[str, Any]]] = {
    "NF4": (
        # The format of the products is the run's, not this one.
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16,
        ),
        {"bits": 4},
    ),
    "FP4": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
        {"bits": 4, "type": "FP4", "doubleQuant": False},
    ),
    "8 bits": (BitsAndBytesConfig(load_in_8bit=True), {"bits": 8}),
}


def stored(tiny: Path, folder: Path, quantization: BitsAndBytesConfig) -> Path:
    """Write the tiny model as quantized files."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, quantization_config=quantization)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", STORED)
def test_losses_are_those_of_quantizing_here(
    kind: str, tiny: Path, tmp_path: Path, make_task: MakeTask, train: Train
) -> None:
    """The same numbers are quantized in the same way, only earlier: all losses are equal, and the result reloads."""
    quantization, settings = STORED[kind]
    given: dict[str, Any] = {
        "method": {"type": "QLoRA", "quantization": settings},
        "model": FLOAT32,
        "hyperparameters": {"maxSteps": 3, "learningRate": 0.01},
    }
    here = train(make_task(**given))
    earlier = train(make_task(**given, model_path=stored(tiny, tmp_path / "stored", quantization)))
    losses = [[event.loss for event in events.of(StepEvent)] for events in (here, earlier)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[1][-1] != losses[1][0]
    assert earlier.of(ResultEvent)[0].reload_max_difference < 1e-4


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("NF4", {"type": "LoRA"}, r"are quantized, and method\.type is LoRA: set method\.type to QLoRA, or model\.uri"),
        ("NF4", {"type": "Full"}, r"are quantized, and method\.type is Full"),
        (
            "NF4",
            {"type": "QLoRA", "quantization": {"bits": 8}},
            r"method\.quantization\.bits is 8, but the files of hf://tests/tiny are quantized with \{'bits': 4, "
            r"'type': 'NF4', 'doubleQuant': True\}, and are taken as they are",
        ),
        ("FP4", {"type": "QLoRA", "quantization": {"type": "NF4"}}, r"method\.quantization\.type is NF4"),
        ("FP4", {"type": "QLoRA", "quantization": {"doubleQuant": True}}, r"method\.quantization\.doubleQuant is True"),
        ("8 bits", {"type": "QLoRA", "quantization": {"bits": 4}}, r"method\.quantization\.bits is 4"),
    ],
)
def test_settings_that_the_files_do_not_have(
    kind: str, method: dict[str, Any], message: str, tiny: Path, tmp_path: Path, make_task: MakeTask, train: Train
) -> None:
    """They are refused before any weight is read."""
    folder = stored(tiny, tmp_path / "stored", STORED[kind][0])
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidConfiguration, match=message):
        train(make_task(method=method, model=FLOAT32, model_path=folder))


def test_other_kinds_of_quantization(tiny: Path, tmp_path: Path, make_task: MakeTask, train: Train) -> None:
    """Nothing trains an adapter on them here."""
    folder = tmp_path / "awq"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    config.save_pretrained(folder)
    with pytest.raises(InvalidModel, match=r"are quantized by awq, which nothing is trained on: set model\.uri to"):
        train(make_task(method={"type": "QLoRA", "quantization": {}}, model_path=folder))
