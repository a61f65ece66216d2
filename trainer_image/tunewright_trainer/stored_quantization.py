"""Base models whose files are quantized already: QLoRA takes those of bitsandbytes as they are."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tunewright_api.run_config import TrainRun
from tunewright_trainer.errors import InvalidConfiguration, InvalidModel

_FIELD = "method.quantization"


def stored_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return how the files of a model are quantized, None where they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return dict(stored if isinstance(stored, dict) else stored.to_dict())


def check_stored(run: TrainRun, config: PretrainedConfig) -> None:
    """Compare how the files of a base are quantized with what the run asks for.

    Raises:
        InvalidModel: They are quantized in a way that no adapter is trained on here.
        InvalidConfiguration: The run trains on other weights than these.
    """
    stored = stored_quantization(config)
    if stored is None:
        return
    if stored.get("quant_method") != "bitsandbytes":
        raise InvalidModel(
            f"the files of {run.model.uri} are quantized by {stored.get('quant_method')}, which nothing is trained on: "
            "set model.uri to the model in 16 bits that they were made from"
        )
    if run.quantization is None:
        raise InvalidConfiguration(
            f"the files of {run.model.uri} are quantized, and method.type is {run.method}: set method.type to QLoRA, "
            "or model.uri to the model in 16 bits that they were made from"
        )
    found = {"bits": 8} if stored.get("load_in_8bit") else _of_4_bits(stored)
    asked = run.quantization.model_dump(by_alias=True, exclude_none=True, include={"bits", "type", "double_quant"})
    for name, value in asked.items():
        if found.get(name) != value:
            raise InvalidConfiguration(
                f"{_FIELD}.{name} is {value}, but the files of {run.model.uri} are quantized with {found}, and are "
                f"taken as they are: set {_FIELD} to the same, or model.uri to the model in 16 bits"
            )


def with_compute_dtype(config: PretrainedConfig, dtype: str) -> None:
    """Let products with stored 4-bit weights be computed in the run's number format, not in the one that they name."""
    stored = stored_quantization(config)
    if stored is not None and stored.get("load_in_4bit"):
        config.quantization_config = {**stored, "bnb_4bit_compute_dtype": dtype}


def _of_4_bits(stored: dict[str, Any]) -> dict[str, Any]:
    return {
        "bits": 4,
        "type": str(stored.get("bnb_4bit_quant_type", "fp4")).upper(),
        "doubleQuant": bool(stored.get("bnb_4bit_use_double_quant", False)),
    }
