"""How the processes of a run hold the model: each one all of it (DDP), or each one its share of the weights (FSDP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.spec_rules import FSDP_METHODS, FSDP_OBJECTIVES, FSDP_OPTIMIZERS
from tunewright_trainer.errors import InvalidConfiguration

WEIGHTS_SHARE = 0.8
"""Of a GPU's memory for weights, gradients and optimizer states; the rest is for activations and the libraries."""
_HEADS = frozenset({"score", "classifier"})
"""Names of the heads that peft saves with an adapter."""
_FLOAT32_BYTES = 4
_QUANTIZED_BYTES = 0.6
"""Of a weight of a base in 4 bits: half a byte, and its part of the scales and of what stays in 16 bits."""
_STATE_BYTES = {"AdamW": 8, "SGD": 0}
"""Of an optimizer for each trained weight: AdamW keeps two float32 averages, SGD without momentum keeps nothing."""


@dataclass(frozen=True)
class Parallelism:
    """What was chosen, and why."""

    sharded: bool
    """FSDP; otherwise DDP, or there is only one process."""
    reason: str

    def __str__(self) -> str:
        """Return it as it stands in the plan and in the log."""
        return f"{'FSDP' if self.sharded else 'DDP'}: {self.reason}"


def choose_parallelism(
    run: TrainRun,
    *,
    parameters: int,
    weight_bytes: int,
    gpu_bytes: int | None,
    adapter: Mapping[str, Any] | None = None,
) -> Parallelism | None:
    """Return how the model is held; None for a run in one process.

    Args:
        run: The run document; `resources.parallelism` decides unless it is Auto.
        parameters: Weights of the base model.
        weight_bytes: Bytes of one of them in memory.
        gpu_bytes: Memory of the smallest GPU of the run; None without GPUs.
        adapter: adapter_config.json of the adapter that the run goes on from.

    Raises:
        InvalidConfiguration: FSDP is asked for, and that adapter has weights of the base in it.
    """
    if run.world_size == 1:
        return None
    obstacle = what_keeps_from_sharding(run) or what_adapter_keeps(adapter or {})
    if run.parallelism == "FSDP" and obstacle is not None:
        raise InvalidConfiguration(
            f"resources.parallelism is FSDP, but {obstacle} is not trained with it: set it to DDP or Auto"
        )
    if run.parallelism != "Auto":
        return Parallelism(run.parallelism == "FSDP", "resources.parallelism says so")
    if obstacle is not None:
        return Parallelism(False, f"{obstacle} is not trained with FSDP")
    if gpu_bytes is None:
        return Parallelism(False, "there is no GPU that the model could be too large for")
    needed = training_bytes(run, parameters, weight_bytes)
    sharded = needed > WEIGHTS_SHARE * gpu_bytes
    return Parallelism(
        sharded,
        f"weights, gradients and optimizer states take {needed / 1e9:.1f} GB, {'more' if sharded else 'no more'} than "
        f"{WEIGHTS_SHARE:.0%} of the {gpu_bytes / 1e9:.1f} GB of a GPU",
    )


def what_keeps_from_sharding(run: TrainRun) -> str | None:
    """Return the setting that FSDP does not go together with, None where there is none.

    The rules of the API refuse these with FSDP; this is for Auto, which then takes DDP.
    """
    if run.method not in FSDP_METHODS:
        return f"method {run.method}"
    if run.quantization is not None and run.quantization.bits != 4:
        return f"method.quantization.bits {run.quantization.bits}"
    if run.objective.type not in FSDP_OBJECTIVES:
        return f"objective {run.objective.type}"
    if run.model.dtype == "Float16":
        return "model.dtype Float16"
    if run.lora is not None and (run.lora.modules_to_save or run.lora.bias != "None"):
        return "lora.modulesToSave" if run.lora.modules_to_save else f"lora.bias {run.lora.bias}"
    if run.method == "Full" and run.hyperparameters.optimizer not in FSDP_OPTIMIZERS:
        return f"hyperparameters.optimizer {run.hyperparameters.optimizer} for all weights"
    return None


def what_adapter_keeps(adapter: Mapping[str, Any]) -> str | None:
    """Return what of the base an adapter has trained along, None where that is at most a head."""
    saved = sorted(set(adapter.get("modules_to_save") or ()) - _HEADS)
    if saved:
        return f"an adapter in model.continueFrom with {', '.join(saved)} in it"
    if adapter.get("bias", "none") != "none":
        return "an adapter in model.continueFrom with bias terms in it"
    return None


def training_bytes(run: TrainRun, parameters: int, weight_bytes: int) -> int:
    """Return the memory of weights, gradients and optimizer states in a process that holds all of the model.

    An adapter's own weights are a few per cent at most and not counted; a reference model is, where one is loaded.
    """
    if run.quantization is not None:
        return round(parameters * (_QUANTIZED_BYTES if run.quantization.bits == 4 else 1))
    if run.method != "Full":
        return parameters * weight_bytes
    trained = 2 * _FLOAT32_BYTES + _STATE_BYTES[run.hyperparameters.optimizer]
    reference = _FLOAT32_BYTES if run.objective.type in ("DPO", "KTO") else 0
    return parameters * (trained + reference)
