"""Number formats on every kind of device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="part of the trainer extra")

from tunewright_api.run_config import StorageSettings, TrainRun, build_train_run  # noqa: E402
from tunewright_api.validation import parse_finetunejob  # noqa: E402
from tunewright_trainer.errors import InvalidConfiguration  # noqa: E402
from tunewright_trainer.hardware import Hardware, choose_precision, find_hardware  # noqa: E402

OLD_CPU = Hardware(on_gpu=False, computes_bfloat16=False)
NEW_CPU = Hardware(on_gpu=False, computes_bfloat16=True)
OLD_GPU = Hardware(on_gpu=True, computes_bfloat16=False)
NEW_GPU = Hardware(on_gpu=True, computes_bfloat16=True)


def run(method: str, dtype: str, quantized: str = "Auto") -> TrainRun:
    """Return a run document."""
    block: dict[str, Any] = {"type": method}
    if method == "QLoRA":
        block["quantization"] = {"bits": 4, "computeDtype": quantized}
    spec = {
        "model": {"uri": "hf://a/b", "dtype": dtype},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "method": block,
        "output": {"uri": "s3://models/out"},
    }
    document = {"apiVersion": "tunewright.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "t"}, "spec": spec}
    job = parse_finetunejob(document)
    return build_train_run(job.spec, name="t", namespace="n", attempt=1, storage=StorageSettings())


@pytest.mark.parametrize(
    ("hardware", "method", "dtype", "name", "weights"),
    [
        (OLD_CPU, "LoRA", "Auto", "Float32", torch.float32),
        (NEW_CPU, "LoRA", "Auto", "BFloat16", torch.bfloat16),
        (OLD_GPU, "LoRA", "Auto", "Float32", torch.float32),
        (NEW_GPU, "LoRA", "Auto", "BFloat16", torch.bfloat16),
        (NEW_GPU, "QLoRA", "Auto", "BFloat16", torch.bfloat16),
        (NEW_GPU, "Full", "Auto", "BFloat16", torch.float32),
        (OLD_GPU, "Full", "Float16", "Float16", torch.float32),
        (OLD_GPU, "LoRA", "Float16", "Float16", torch.float16),
        (OLD_CPU, "LoRA", "BFloat16", "BFloat16", torch.bfloat16),
        (NEW_GPU, "LoRA", "Float32", "Float32", torch.float32),
    ],
)
def test_precision(hardware: Hardware, method: str, dtype: str, name: str, weights: Any) -> None:
    """Auto takes bfloat16 where the device computes in it; full fine-tuning keeps float32 weights in any case."""
    precision = choose_precision(run(method, dtype), hardware)
    assert (precision.name, precision.weights) == (name, weights)
    assert precision.quantized_compute == precision.compute


def test_compute_format_of_quantized_weights_is_its_own() -> None:
    """computeDtype overrides the model's format for products with quantized weights only."""
    precision = choose_precision(run("QLoRA", "BFloat16", "Float32"), NEW_GPU)
    assert (precision.compute, precision.quantized_compute) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("hardware", "method", "dtype", "quantized", "message"),
    [
        (NEW_CPU, "LoRA", "Float16", "Auto", "model.dtype is Float16, which needs a GPU"),
        (NEW_GPU, "QLoRA", "Float16", "Auto", "model.dtype is Float16, which QLoRA does not train in"),
        (NEW_GPU, "QLoRA", "Auto", "Float16", "method.quantization.computeDtype is Float16"),
        (OLD_GPU, "Full", "BFloat16", "Auto", "compute capability below 8.0"),
    ],
)
def test_formats_the_device_does_not_have(
    hardware: Hardware, method: str, dtype: str, quantized: str, message: str
) -> None:
    """What cannot work is refused with the field and what to use instead."""
    with pytest.raises(InvalidConfiguration, match=message):
        choose_precision(run(method, dtype, quantized), hardware)


def test_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that asks for a GPU does not silently train on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidConfiguration, match=r"resources\.gpus is 1, but PyTorch .* sees no GPU"):
        find_hardware(1)


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod with fewer GPUs than the run asks for says so, before a process finds none for itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidConfiguration, match=r"resources\.gpus is 4, but PyTorch sees only 2 of them"):
        find_hardware(4, 3)


def test_a_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of four processes loads its models to the third GPU."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    assert (find_hardware(4, 2).device, find_hardware(4, 2).memory_bytes) == (2, 80 * 10**9)
    assert set(chosen) == {2}
    assert find_hardware(0).device == "cpu"


def test_cpu_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes bfloat16 when it has the instructions, whatever its maker calls them."""
    for features, expected in (({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({"bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert find_hardware(0) == Hardware(on_gpu=False, computes_bfloat16=expected)
