"""4-bit and 8-bit bases: our arithmetic against that of bitsandbytes, and what the choice of the base does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type, quantize_4bit
from numpy.typing import NDArray
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.trainer.merge_kit import MODELS, adapt, load, logits, make_base, merge_folders, quiet, run_case
from tunewright_trainer.errors import InvalidAdapter
from tunewright_trainer.merge import four_bits
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.numbers import from_float32, to_float32

Float32 = NDArray[np.float32]


def weights(rows: int, columns: int) -> Float32:
    """Draw numbers of the size of weights, some of them large."""
    generator = np.random.default_rng(rows)
    values = generator.standard_normal((rows, columns), np.float32) * np.float32(0.03)
    values[generator.random((rows, columns)) > 0.999] *= 20
    return values


def round_trip(values: Float32, kind: four_bits.Kind, double_quant: bool) -> Float32:
    """Quantize and dequantize by our arithmetic."""
    scales = four_bits.block_scales(values.reshape(-1))
    stored = four_bits.double_quantized(scales) if double_quant else scales
    return four_bits.dequantized(four_bits.quantized(values.reshape(-1), scales, kind), stored).reshape(values.shape)


def test_the_tables_are_those_of_bitsandbytes() -> None:
    """The 256 numbers that scales are rounded to, and the 16 of each format."""
    assert np.array_equal(four_bits.dynamic_code(), create_dynamic_map().numpy())  # type: ignore[no-untyped-call]
    kinds: tuple[four_bits.Kind, ...] = ("NF4", "FP4")
    for kind in kinds:
        theirs = get_4bit_type(kind.lower(), device="cpu")  # type: ignore[no-untyped-call]
        assert np.array_equal(four_bits.code_of(kind), theirs.numpy())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["NF4", "FP4"])
@pytest.mark.parametrize("shape", [(64, 96), (257, 1024), (3, 40)])
def test_rounding_equals_that_of_bitsandbytes(kind: four_bits.Kind, double_quant: bool, shape: tuple[int, int]) -> None:
    """Every number comes back as from bitsandbytes to the last bit, but for the double quantization: there one scale in
    a hundred is a step off, because bitsandbytes looks scales up in a coarser table on CPUs than on GPUs."""
    values = weights(*shape)
    packed, state = quantize_4bit(
        torch.from_numpy(values), quant_type=kind.lower(), compress_statistics=double_quant, blocksize=64
    )
    expected = dequantize_4bit(packed, state).numpy()
    ours = round_trip(values, kind, double_quant)
    if not double_quant:
        assert np.array_equal(ours, expected)
    off = ~np.isclose(ours, expected, rtol=1e-6, atol=1e-9)
    assert off.mean() < 0.01
    np.testing.assert_allclose(ours, expected, rtol=0.08, atol=1e-9)


def test_bfloat16_comes_back_as_bfloat16() -> None:
    """A bfloat16 base is rounded to 4 bits and comes back in bfloat16, as bitsandbytes gives it to the layer."""
    values = to_float32(from_float32(weights(64, 128), "BF16"), "BF16")
    packed, state = quantize_4bit(torch.from_numpy(values).to(torch.bfloat16), quant_type="nf4")
    expected = dequantize_4bit(packed, state).float().numpy()
    ours = to_float32(from_float32(round_trip(values, "NF4", False), "BF16"), "BF16")
    assert np.array_equal(ours, expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 of 64 columns, as blocks of 64 want it."""
    MODELS["wide"] = ("qwen2", {**MODELS["qwen2"][1], "hidden_size": 64, "intermediate_size": 128})
    return make_base(tmp_path_factory.mktemp("quantized") / "qwen2", "wide")


def lora(**changes: Any) -> LoraConfig:
    """Build the configuration of an adapter for all linear layers."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets, **changes})


def load_quantized(folder: Path, **settings: Any) -> Any:
    """Load a model with 4-bit or 8-bit layers, computing in float32."""
    how = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    return model.eval()


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        (NF4, BaseQuantization()),
        ({**NF4, "bnb_4bit_use_double_quant": False}, BaseQuantization(double_quant=False)),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, BaseQuantization(type="FP4")),
    ],
    ids=["nf4-double", "nf4", "fp4"],
)
@pytest.mark.parametrize("config", [lora(), lora(use_dora=True)], ids=["lora", "dora"])
def test_the_dequantized_base_is_what_the_adapter_saw(
    base: Path, tmp_path: Path, settings: dict[str, Any], how: BaseQuantization, config: LoraConfig
) -> None:
    """Merged into the dequantized base, the model gives the logits of the quantized base with the adapter, whereas the
    original base gives others: by some hundred times more than rounding."""
    adapted = adapt(load_quantized(base, **settings), config)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    merge_folders(base, tmp_path / "adapter", tmp_path / "dequantized", dequantized=how)
    merge_folders(base, tmp_path / "adapter", tmp_path / "original")
    near = (logits(load(tmp_path / "dequantized")) - expected).abs().max().item()
    far = (logits(load(tmp_path / "original")) - expected).abs().max().item()
    assert near < 1e-4
    assert far > 100 * near
    assert far < 1.5


def test_eight_bits(base: Path, tmp_path: Path) -> None:
    """LLM.int8 rounds the layer's inputs as well, which no weights hold: the dequantized base comes nearer than the
    original one, but not to the last digit."""
    with quiet():
        adapted = adapt(load_quantized(base, load_in_8bit=True), lora())
        adapted.save_pretrained(tmp_path / "adapter")
        model = adapted.merge_and_unload()
    merge_folders(base, tmp_path / "adapter", tmp_path / "merged", dequantized=BaseQuantization(bits=8))
    assert model is not None
    ours = load_file(tmp_path / "merged/model.safetensors")
    original = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(ours[name], original[name])
    assert torch.isfinite(ours[name]).all()


def test_a_stored_4_bit_base_is_dequantized(base: Path, tmp_path: Path) -> None:
    """A base whose files are in 4 bits becomes a model in 16 or 32 bits without a quantization in its configuration."""
    for double_quant in (False, True):
        work = tmp_path / str(double_quant)
        quantized = load_quantized(base, **{**NF4, "bnb_4bit_use_double_quant": double_quant})
        quantized.save_pretrained(work / "base")
        adapted = adapt(AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).eval(), lora())
        adapted.save_pretrained(work / "adapter")
        findings = merge_folders(work / "base", work / "adapter", work / "merged")
        torch.testing.assert_close(logits(load(work / "merged")), logits(adapted), rtol=1e-4, atol=1e-4)
        merged = load_file(work / "merged/model.safetensors")
        assert merged.keys() == load_file(base / "model.safetensors").keys()
        assert "quantization_config" not in (work / "merged/config.json").read_text()
        assert findings.unchanged == ()


def test_a_stored_8_bit_base_is_dequantized(base: Path, tmp_path: Path) -> None:
    """So does one in 8 bits; its layers round their inputs as well, so the logits are near and not equal."""
    with quiet():
        load_quantized(base, load_in_8bit=True).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        adapted = adapt(model, lora())
        adapted.save_pretrained(tmp_path / "adapter")
        expected = logits(adapted)
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="Float32")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0.1, atol=0.1)


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    """GPT-2 keeps its weights the other way round, which bitsandbytes turns before it makes blocks."""
    gpt2 = make_base(tmp_path / "gpt2", "gpt2")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    with warnings.catch_warnings(), pytest.raises(InvalidAdapter, match="set quantizedBase to Original"):
        run_case(gpt2, tmp_path, config, dequantized=BaseQuantization())
