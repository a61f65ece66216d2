"""A model that several processes hold together (FSDP2): what differs from one that each of them holds by itself.

transformers spreads the weights of a base while it loads them (those in 4 bits right after), and its trainer exchanges
the gradients; an adapter that is put on it afterwards is small and stays whole in every process. Nothing here depends
on the device: the same calls run over NCCL on GPUs and over gloo on CPUs. What runs the model is done by all processes
at once, because each layer is gathered from all of them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, set_seed
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from tunewright_trainer.errors import InvalidConfiguration

_WHOLE_UNTIL_USED = "free_full_weight"
"""A layer is gathered when it is computed, and given up again."""


def sharded_over(processes: int, empty: PreTrainedModel) -> DistributedConfig:
    """Return how `from_pretrained` spreads a model over processes, layer by layer.

    Args:
        processes: All of the run.
        empty: The model without weights.

    Raises:
        InvalidConfiguration: The layers of this kind of model are not known.
    """
    layers = set(empty._no_split_modules or ())
    names = {
        replace_layer_number_by_wildcard(name)
        for name, module in empty.named_modules()
        if type(module).__name__ in layers
    }
    if not names:
        raise InvalidConfiguration(
            f"resources.parallelism is FSDP, but which layers a model of type {empty.config.model_type!r} has to be "
            "gathered by is not known: set it to DDP"
        )
    known = {name: style for name, style in empty.fsdp_plan.items() if name not in names}
    present = {replace_layer_number_by_wildcard(name) for name, _ in empty.named_modules()}
    plan = {name: style for name, style in known.items() if name in present} | dict.fromkeys(names, _WHOLE_UNTIL_USED)
    return DistributedConfig(fsdp_size=processes, fsdp_plan=plan)


def let_go(model: nn.Module) -> None:
    """Give up what was gathered for the last use of the model and kept for the next, so that its parameters are shares.

    All processes have to: one that has kept a layer would not take part when the others gather it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(weight: torch.Tensor) -> torch.Tensor:
    """Return this process's share of a weight, in the same memory; all of it where it is not sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_sharded(model: nn.Module) -> bool:
    """Tell whether any weight of a model is spread over processes."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def spread_quantized(model: PreTrainedModel, sharding: DistributedConfig) -> None:
    """Spread a base in 4 bits, which every process has loaded all of, and move its shares to the devices that train.

    Spread while it is loaded, each share would be quantized by itself, with scales of its own. Packed whole, weights
    are bytes that FSDP spreads and gathers like any others; the scales, a few per cent of them, stay in every process,
    where bitsandbytes finds them through the layer.

    Args:
        model: In main memory, because it need not fit a GPU.
        sharding: As `sharded_over` gave it.
    """
    _, device, mesh = model.prepare_distribute_model(sharding)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.quant_state = layer.weight.quant_state
        layer.quant_state.to(device)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(torch.Tensor), requires_grad=False)
    # As in loading, where what is tied is spread as if it were not, and tied afterwards.
    for name in model.all_tied_weights_keys:
        owner, _, part = name.rpartition(".")
        setattr(model.get_submodule(owner), part, nn.Parameter(model.get_parameter(name).to("meta")))
    model.maybe_distribute_model(model, sharding, mesh)
    model.tie_weights(recompute_mapping=False)
    # Where accelerate expects a quantized model to be.
    model.hf_device_map = {"": device}  # type: ignore[assignment]  # an attribute that is set from outside there, too
    for layer in layers:
        # peft reads how a layer is quantized from its weight.
        layer.weight.compress_statistics = layer.quant_state.nested
        layer.weight.quant_type = layer.quant_state.quant_type


def packed_away(model: nn.Module) -> int:
    """Return how many weights a spread model has more than numbers: those in 4 bits are two to a byte."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    return sum(
        layer.in_features * layer.out_features - layer.weight.numel()
        for layer in layers
        if isinstance(layer.weight, DTensor)
    )


@torch.no_grad()
def draw_missing(model: PreTrainedModel, missing: Collection[str], seed: int) -> None:
    """Draw the weights of a head that the files do not have as one process would, each process keeping its share.

    Without, every process would draw its rows from the same random numbers, and all labels would begin with equal ones.

    Args:
        model: Just loaded.
        missing: Names of the weights.
        seed: Of the run.
    """
    set_seed(seed)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or f"{name}.weight" not in missing:
            continue
        size = (layer.in_features, layer.out_features)
        form = {"device": local(layer.weight).device, "dtype": layer.weight.dtype}
        whole = nn.utils.skip_init(nn.Linear, *size, bias=layer.bias is not None, **form)
        model._init_weights(whole)
        for part, weight in layer.named_parameters():
            assert isinstance(weight, DTensor), "all weights are spread"
            share = distribute_tensor(
                whole.get_parameter(part), weight.device_mesh, weight.placements, src_data_rank=None
            )
            local(weight).copy_(local(share))


def make_heads_whole(model: nn.Module) -> None:
    """Give each process all of a head that peft has copied for training: only the original is gathered for use."""
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for part in wrapper.modules_to_save.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                if isinstance(weight, DTensor):
                    setattr(part, name, nn.Parameter(weight.full_tensor().detach().clone(), weight.requires_grad))


def own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what every process has all of: an adapter. All processes call it, because it lets go like `let_go`."""
    return {name: weight for name, weight in model.state_dict().items() if not isinstance(weight, DTensor)}


def whole_weights(model: nn.Module, dtype: torch.dtype, *, keep: bool) -> dict[str, torch.Tensor]:
    """Gather all weights of a model, one at a time, in main memory. All processes take part.

    Args:
        model: Sharded.
        dtype: Number format of the weights that are returned.
        keep: This process wants them; the others get an empty dictionary.
    """
    gathered: dict[str, torch.Tensor] = {}
    for name, weight in _stored(model):
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if keep:
            gathered[name] = whole.detach().to("cpu", dtype if whole.is_floating_point() else None, copy=True)
    return gathered


def _stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a model's files hold, shared weights once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    yield from ((name, weight) for name, weight in model.state_dict().items() if name not in tied)


def save_whole(
    model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype, *, has_head: bool
) -> None:
    """Write gathered weights as `save_pretrained` writes a model that one process holds."""
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    kind: Any = AutoModelForSequenceClassification if has_head else AutoModelForCausalLM
    with torch.device("meta"):
        whole: PreTrainedModel = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    if whole.can_generate():
        whole.generation_config = model.generation_config
    whole.save_pretrained(folder, state_dict=weights)


def digest_of(folder: Path) -> str:
    """Return a SHA-256 over the weight files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
