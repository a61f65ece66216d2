"""Tokenizer and base model, from a local folder: safetensors only, no code of the model's own, no network."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig

from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.method import Quantization
from tunewright_trainer.errors import InvalidModel
from tunewright_trainer.hardware import Precision
from tunewright_trainer.sharding import draw_missing, spread_quantized
from tunewright_trainer.stored_quantization import stored_quantization, with_compute_dtype

_ATTENTION = {"Auto": None, "Eager": "eager", "SDPA": "sdpa"}
"""None: transformers takes SDPA where the model has it, else eager."""


def load_tokenizer(path: Path, run: TrainRun) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the run's chat template and a padding token.

    The padding token is the end-of-sequence token where the model brings none. That hides nothing from training:
    labels are made from the rows, padding is added to them later as ignored.

    Raises:
        InvalidModel: The files are missing or damaged, or there is no token to pad with.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidModel(f"the tokenizer of {run.model.uri} cannot be loaded: {error}") from error
    if run.model.chat_template is not None:
        tokenizer.chat_template = run.model.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InvalidModel(
            f"the tokenizer of {run.model.uri} has neither a padding nor an end-of-sequence token, so rows cannot be "
            "put into batches: set pad_token in tokenizer_config.json to one of its tokens"
        )
    return tokenizer


def load_model(
    path: Path,
    run: TrainRun,
    precision: Precision,
    *,
    weights: torch.dtype,
    device: int | str,
    outputs: Sequence[str] | None = None,
    sharding: DistributedConfig | None = None,
) -> PreTrainedModel:
    """Load a model to the device that trains, quantized where the run says so and the files are not.

    Args:
        path: Folder of the base model or of a saved one.
        run: The run document.
        precision: Number formats of the run.
        weights: Number format of the weights that are not quantized.
        device: Number of the GPU, or "cpu".
        outputs: Names of the numbers that a head on the last token gives (labels, or one reward); None: the next token.
            A head that the files do not have is drawn at random.
        sharding: How the processes of the run hold it together, each reading its share; None: all of it.

    Raises:
        InvalidModel: The files are missing, damaged, or of an architecture that is not known.
    """
    head: dict[str, Any] = {}
    if outputs is not None:
        head = {"num_labels": len(outputs), "id2label": dict(enumerate(outputs))}
        head["label2id"] = {name: number for number, name in head["id2label"].items()}
    try:
        config = AutoConfig.from_pretrained(path, **head, local_files_only=True, trust_remote_code=False)
        with_compute_dtype(config, str(precision.quantized_compute).removeprefix("torch."))
        model, missing = _read(path, config, run, precision, weights, device, sharding, has_head=outputs is not None)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InvalidModel(f"the model {run.model.uri} cannot be loaded: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise InvalidModel(
            f"the model {run.model.uri} has weights of other shapes than the run needs"
            + (f", such as a head with another number of outputs than {len(outputs)}" if outputs is not None else "")
            + ": set model.uri to the model that it was made from"
        ) from error
    if sharding is not None and run.quantization is None:
        draw_missing(model, missing, run.hyperparameters.seed)
    elif sharding is not None:
        spread_quantized(model, sharding)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with avx512_bf16 the first evaluation would repack the weights for inference: rounded, and for
            # good without a gradient through the layer, so that training after an evaluation learns wrongly.
            module.support_avx512bf16_for_cpu = False
    return model


def _read(
    path: Path,
    config: PretrainedConfig,
    run: TrainRun,
    precision: Precision,
    weights: torch.dtype,
    device: int | str,
    sharding: DistributedConfig | None,
    *,
    has_head: bool,
) -> tuple[PreTrainedModel, set[str]]:
    """Return the model, and the names of the weights that the files do not have.

    Quantized weights that are to be spread are read whole into main memory: they need not fit a GPU.
    """
    quantization = run.quantization if stored_quantization(config) is None else None
    place: dict[str, Any] = {"device_map": {"": device}}
    if sharding is not None:
        place = {"distributed_config": sharding} if run.quantization is None else {"device_map": {"": "cpu"}}
    kind: Any = AutoModelForSequenceClassification if has_head else AutoModelForCausalLM
    model, loaded = kind.from_pretrained(
        path,
        config=config,
        dtype=weights,
        attn_implementation=_ATTENTION[run.model.attention],
        quantization_config=quantization_config(quantization, precision) if quantization else None,
        **place,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return model, loaded["missing_keys"]


def quantization_config(quantization: Quantization, precision: Precision) -> BitsAndBytesConfig:
    """Return how the frozen base is stored."""
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=(quantization.type or "NF4").lower(),
        bnb_4bit_use_double_quant=quantization.double_quant is not False,
        bnb_4bit_compute_dtype=precision.quantized_compute,
    )


def base_model_id(run: TrainRun) -> str:
    """Return what the adapter names as its base: the hub's name of the model, or its URI."""
    return str(run.model.uri).removeprefix("hf://").rstrip("/")


def peak_memory_bytes(*, on_gpu: bool) -> int:
    """Return the peak of GPU memory, or of this process's resident memory on a CPU."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
