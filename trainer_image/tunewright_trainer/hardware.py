"""What the device computes in, and the number formats that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.method import MethodType
from tunewright_api.v1alpha1.parts import DType
from tunewright_trainer.errors import InvalidConfiguration

TORCH_DTYPES = {"Float32": torch.float32, "BFloat16": torch.bfloat16, "Float16": torch.float16}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_BFLOAT16_CAPABILITY = (8, 0)
"""CUDA compute capability of Ampere, the first with bfloat16 units."""
_BFLOAT16_CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instruction sets that multiply bfloat16; without one a CPU emulates it, ten times slower than float32."""


@dataclass(frozen=True)
class Hardware:
    """The device that trains."""

    on_gpu: bool
    computes_bfloat16: bool
    index: int = 0
    """Number of this process's GPU."""
    memory_bytes: int | None = None
    """Of the GPU; None on a CPU."""

    @property
    def device(self) -> int | str:
        """Where models go, as `device_map` names it."""
        return self.index if self.on_gpu else "cpu"


@dataclass(frozen=True)
class Precision:
    """Number formats of a run."""

    name: str
    """The resolved `model.dtype`: what matrix products are computed in, and a full model is saved in."""
    weights: torch.dtype
    """Of the model in memory. Full fine-tuning keeps float32 weights whatever it computes in: an update of 2e-5 of a
    weight is lost in bfloat16's eight bits."""
    compute: torch.dtype
    quantized_compute: torch.dtype
    """Of matrix products with quantized weights."""


def name_of(dtype: torch.dtype) -> str:
    """Return a number format as `model.dtype` names it."""
    return _NAMES[dtype]


def find_hardware(gpus: int, index: int = 0) -> Hardware:
    """Look at the device that a process of a run trains on, and make it the current one.

    Args:
        gpus: GPUs of this machine that the run asks for, one for each of its processes here.
        index: Number of the process on this machine.

    Raises:
        InvalidConfiguration: More GPUs are asked for than are visible.
    """
    if gpus == 0:
        features = torch.cpu.get_capabilities()
        return Hardware(on_gpu=False, computes_bfloat16=any(features.get(f) for f in _BFLOAT16_CPU_FEATURES))
    if not torch.cuda.is_available():
        raise InvalidConfiguration(
            f"resources.gpus is {gpus}, but PyTorch {torch.__version__} sees no GPU: use an image with CUDA on a node "
            "with a working driver, or set resources.gpus to 0 to train on the CPU"
        )
    if torch.cuda.device_count() < gpus:
        raise InvalidConfiguration(
            f"resources.gpus is {gpus}, but PyTorch sees only {torch.cuda.device_count()} of them: see "
            "CUDA_VISIBLE_DEVICES and the node's device plugin, or lower resources.gpus"
        )
    torch.cuda.set_device(index)
    computes_bfloat16 = torch.cuda.get_device_capability(index) >= _BFLOAT16_CAPABILITY
    memory = torch.cuda.get_device_properties(index).total_memory
    return Hardware(on_gpu=True, computes_bfloat16=computes_bfloat16, index=index, memory_bytes=memory)


def choose_precision(run: TrainRun, hardware: Hardware) -> Precision:
    """Resolve `model.dtype` and `method.quantization.computeDtype` on this hardware.

    Raises:
        InvalidConfiguration: The device does not compute in the format asked for.
    """
    compute = _resolve(run.model.dtype, run.method, hardware, "model.dtype")
    quantized = compute
    if run.quantization is not None and run.quantization.compute_dtype != "Auto":
        quantized = _resolve(run.quantization.compute_dtype, run.method, hardware, "method.quantization.computeDtype")
    return Precision(
        name=compute,
        weights=torch.float32 if run.method == "Full" else TORCH_DTYPES[compute],
        compute=TORCH_DTYPES[compute],
        quantized_compute=TORCH_DTYPES[quantized],
    )


def _resolve(asked: DType, method: MethodType, hardware: Hardware, field: str) -> str:
    if asked == "Auto":
        return "BFloat16" if hardware.computes_bfloat16 else "Float32"
    if asked == "Float16" and not hardware.on_gpu:
        raise InvalidConfiguration(f"{field} is Float16, which needs a GPU: use Auto, BFloat16 or Float32 on a CPU")
    if asked == "Float16" and method == "QLoRA":
        # Adapters on a quantized base are bfloat16, and float16's loss scaling does not exist for them.
        raise InvalidConfiguration(f"{field} is Float16, which QLoRA does not train in: use Auto, BFloat16 or Float32")
    if asked == "BFloat16" and hardware.on_gpu and not hardware.computes_bfloat16:
        raise InvalidConfiguration(
            f"{field} is BFloat16, but the GPU has compute capability below 8.0: use Auto, Float32 or Float16"
        )
    return asked
