"""The result of a training: its files, and how they are loaded again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tunewright_trainer.errors import VerificationFailed
from tunewright_trainer.model import load_model
from tunewright_trainer.sharding import digest_of, make_heads_whole, own_weights, save_whole, whole_weights

if TYPE_CHECKING:
    from tunewright_trainer.recipe import Setup


def save(setup: Setup, model: PreTrainedModel | PeftModel, *, has_head: bool = False) -> None:
    """Write the adapter or the model with its tokenizer.

    Of processes that hold it together one of each pod writes, because all of them read the files in the proof.

    Args:
        setup: Of the run.
        model: What was trained.
        has_head: It is a classifier or a reward model.

    Raises:
        VerificationFailed: The pods wrote different files.
    """
    world = setup.world
    if setup.sharding is None:
        write(setup, model)
        return
    writes = world.local_rank == 0
    if setup.trains_adapter:
        # Without, peft would gather the base in every process, to leave it out then.
        adapter = own_weights(model)
        if writes:
            write(setup, model, adapter)
    if not setup.trains_adapter:
        base = cast("PreTrainedModel", model)
        weights = whole_weights(base, setup.result_dtype, keep=writes)
        if writes:
            save_whole(base, setup.result_path, weights, setup.result_dtype, has_head=has_head)
            setup.tokenizer.save_pretrained(setup.result_path)
    digests = {digest for digest in world.gather(digest_of(setup.result_path) if writes else None) if digest}
    if len(digests) > 1:
        raise VerificationFailed("the pods of the run gathered different weights; nothing is published")


def write(setup: Setup, model: PreTrainedModel | PeftModel, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter, or a model that this process holds all of, with the tokenizer.

    Args:
        setup: Of the run.
        model: What was trained.
        weights: The adapter's; None: those that the model has.
    """
    setup.result_path.mkdir(parents=True, exist_ok=True)
    if setup.trains_adapter:
        # The vocabulary is never resized; "auto" would ask the hub about the base model to find that out.
        # And of a DPO run that went on from an adapter only what it trained: not the reference, a copy of the start.
        model.save_pretrained(
            setup.result_path,
            save_embedding_layers=False,
            selected_adapters=["default"],
            state_dict=weights,
        )
        (setup.result_path / "README.md").unlink()  # peft's unfilled form of a model card
    else:
        model.save_pretrained(setup.result_path)
    setup.tokenizer.save_pretrained(setup.result_path)


def save_samples(setup: Setup, answers: list[dict[str, str]]) -> None:
    """Write samples.json."""
    text = json.dumps(answers, ensure_ascii=False, indent=2)
    (setup.task.output_path / "samples.json").write_text(text + "\n", encoding="utf-8")


def load_result(setup: Setup, outputs: Sequence[str] | None = None) -> PreTrainedModel | PeftModel:
    """Load the saved files as a user would."""
    run, precision = setup.task.run, setup.precision
    load = partial(
        load_model, run=run, precision=precision, device=setup.hardware.device, outputs=outputs, sharding=setup.sharding
    )
    if not setup.trains_adapter:
        return load(setup.result_path, weights=setup.proof_dtype)
    base = load(setup.task.model_path, weights=precision.weights)
    model = PeftModel.from_pretrained(base, setup.result_path)
    if outputs is not None:
        base.config.pad_token_id = setup.tokenizer.pad_token_id
        match_head(setup, model)
    if run.quantization is not None:
        round_adapter(model)
    return model


def match_head(setup: Setup, model: nn.Module) -> None:
    """Give the classification head beside an adapter the number format of the hidden states that it reads."""
    make_heads_whole(model)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data = parameter.data.to(setup.precision.weights)


def round_adapter(model: PeftModel) -> None:
    """Round an adapter on a quantized base to bfloat16, in which TRL trains them; peft loads them as float32."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
