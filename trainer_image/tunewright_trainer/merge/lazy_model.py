"""A model whose weights stay in their files until the forward pass of a layer needs them.

The modules are built without memory, by transformers; accelerate's hooks set a layer's weights before its forward pass
and drop them after it. So the memory that is needed is that of the largest layer in float32 (a decoder layer, the
embedding or the output head), not that of the model. Names of tensors in files become names of parameters by
transformers' own rules, those that fuse experts included, so that this is the model that `from_pretrained` gives.

Everything is computed in float32 from the numbers that the files hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils import set_module_tensor_to_device
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tunewright_trainer.errors import InvalidAdapter, InvalidModel
from tunewright_trainer.merge.checkpoint import Checkpoint

Transform = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""What becomes of a float32 weight, stored in some number format, before anything is computed with it."""
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the names that safetensors files have for them."""
_READ_BYTES = 1 << 24
"""Of a tensor at once: bytes and their float32 are there together for so many only."""
_WRAPPERS = {"base_layer", "original_module", "token_adapter", "modules_to_save"}
"""Names of modules that peft puts between a model's own modules."""


class LazyWeights:
    """Parameters and buffers of a model by name, read from a checkpoint each time that one is asked for."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, *, may_lack: bool = False) -> None:
        """Find out which tensors of the files make which parameter.

        Args:
            model: Built by `build_empty`; not yet in peft's hands.
            checkpoint: The files.
            may_lack: Parameters, or the last rows of them, that the files do not have are zeros: the head and the
                tokens that an adapter adds to its base.
        """
        self._model = model
        self._checkpoint = checkpoint
        self._may_lack = may_lack
        self._state = model.state_dict()
        weights = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in weights if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in weights if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._pieces = self._group()
        """By the first parameter that they make: pattern and name of each tensor."""
        self._found = {
            target: (first, target) for first in self._pieces for target in self._convert(first, self._empty)
        }
        """By parameter: the group that makes it, and its name there, which is another one for tied parameters."""
        for target, source in model.all_tied_weights_keys.items():
            for one, other in ((target, source), (source, target)):
                if one not in self._found and other in self._found:
                    self._found[one] = self._found[other]
        buffers = dict(model.named_buffers())
        self.lacking = [name for name in self._state if name not in self._found and name not in buffers]
        """Names of the parameters that nothing in the files makes."""
        self.transforms: dict[str, Transform] = {}
        """By the parameters that they are for."""

    def __contains__(self, name: str) -> bool:
        """Tell whether the files have what makes this parameter."""
        return name in self._found

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a parameter: floats as float32, of the shape that the model has.

        Raises:
            InvalidModel: The files do not have it, or not in this shape.
        """
        wanted = self._state[name]
        if name not in self._found:
            if self._may_lack:
                return torch.zeros(wanted.shape, dtype=wanted.dtype)
            raise InvalidModel(f"{self._checkpoint.reader.uri} lacks what makes {name}")
        first, target = self._found[name]
        found = self._convert(first, self._read)[target]
        if name in self.transforms:
            found = self.transforms[name](found, self.stored_dtype(name))
        if self._may_lack and found.shape[1:] == wanted.shape[1:] and len(found) < len(wanted):
            found = torch.cat([found, found.new_zeros(len(wanted) - len(found), *found.shape[1:])])
        if found.shape != wanted.shape:
            raise InvalidModel(
                f"{self._checkpoint.reader.uri} has {name} in the shape {list(found.shape)}, the model needs "
                f"{list(wanted.shape)}"
            )
        return found

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the number format in which the files have a parameter."""
        _, tensor = self._pieces[self._found[name][0]][0]
        return TORCH_DTYPES[self._checkpoint.tensors[tensor].dtype]

    def tensors_of(self, name: str) -> list[str]:
        """Return the names of the tensors in the files that make a parameter."""
        return [tensor for _, tensor in self._pieces[self._found[name][0]]]

    def _group(self) -> dict[str, list[tuple[str | None, str]]]:
        prefix = self._model.base_model_prefix
        pieces: dict[str, list[tuple[str | None, str]]] = {}
        for name in sorted(self._checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
            if target not in self._state and name in self._state:
                target, pattern = rename_source_key(name, [], [], prefix, self._state)
            if target in self._state:
                pieces.setdefault(target, []).append((pattern, name))
        return pieces

    def _convert(self, first: str, tensor: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the parameters that the tensors of one group make, by name."""
        pieces = self._pieces[first]
        if pieces[0][0] is None:
            return {first: tensor(pieces[0][1])}
        converter = deepcopy(self._by_pattern[pieces[0][0]])
        for pattern, name in pieces:
            converter.add_tensor(first, name, pattern, tensor(name))  # type: ignore[arg-type]
        made: dict[str, Any] = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _read(self, name: str) -> torch.Tensor:
        found = self._checkpoint.tensors[name]
        if not TORCH_DTYPES[found.dtype].is_floating_point or not found.shape or not found.length:
            # A copy: bytes as they were read may not be written to.
            return torch.tensor(self._checkpoint.read(name))
        whole = torch.empty(found.shape)
        rows = max(1, _READ_BYTES * found.shape[0] // found.length)
        for first in range(0, found.shape[0], rows):
            part = slice(first, min(first + rows, found.shape[0]))
            whole[part] = torch.from_numpy(self._checkpoint.read_float32(name, part))
        return whole

    def _empty(self, name: str) -> torch.Tensor:
        tensor = self._checkpoint.tensors[name]
        return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")


def build_empty(kind: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the modules of a model for float32, without memory for weights; buffers that no file has are there.

    Args:
        kind: An Auto class or a class of models.
        config: Of the model.

    Raises:
        InvalidModel: Models of this type are not known to transformers.
    """
    try:
        with init_empty_weights(include_buffers=False):
            build = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
            model: PreTrainedModel = build(config, dtype=torch.float32)
    except (ValueError, KeyError, ImportError) as error:
        raise InvalidModel(f"models of type {config.model_type!r} cannot be built: {error}") from error
    model.config.use_cache = False
    # Classifiers look at the last token before the padding, which no prompt has here.
    model.config.pad_token_id = -1
    model.eval()
    return model


def own_name(name: str) -> str:
    """Return the name that a parameter has without peft around it."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in parts:  # followed by the name of the adapter
        del parts[parts.index("modules_to_save") + 1]
    return ".".join(part for part in parts if part not in _WRAPPERS)


class _Named(Mapping[str, torch.Tensor]):
    """Weights by the names that they have in a model with peft around it."""

    def __init__(self, model: nn.Module, weights: LazyWeights, adapter: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # Under any of its names: what is tied is one parameter with several.
        shared = {id(parameters[name]): tensor for name, tensor in adapter.items() if name in parameters}
        self._names = list(parameters)
        self._adapter = {name: shared[id(value)] for name, value in parameters.items() if id(value) in shared}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._adapter:
            # A copy: peft merges into the tensor that it is given.
            return self._adapter[name].clone()
        return self._weights[own_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def with_adapter(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Put peft's modules into an empty model, and return the adapter's tensors by the names they have there.

    Raises:
        InvalidAdapter: The adapter is not one of this model.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        with warnings.catch_warnings():
            # What peft says of merging into tied weights is true of its own way to do it.
            warnings.simplefilter("ignore", UserWarning)
            # peft draws weights that the file lacks at random: then the file is another model's.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True, torch_device="cpu")
            # peft keeps adapters where their base is, which is nowhere; what it would load them from is kept here.
            watch = adapted.register_load_state_dict_pre_hook(lambda _, state, *rest: tensors.update(state))
            set_peft_model_state_dict(adapted, load_peft_weights(folder, device="cpu"), low_cpu_mem_usage=True)
            watch.remove()
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        reason = " ".join(str(error).split())[:400]
        raise InvalidAdapter(f"the adapter does not fit the base model: {reason}") from error
    return adapted.eval(), {name: tensor.float() for name, tensor in tensors.items()}


def attach(
    model: PreTrainedModel | PeftModel, weights: LazyWeights, adapter: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> None:
    """Let a model read its weights layer by layer, and drop them again.

    Args:
        model: Empty.
        weights: Of the model itself.
        adapter: Of the adapter, if it has one, as `with_adapter` returned them.
    """
    own = model.get_base_model() if isinstance(model, PeftModel) else model
    _set_buffers(model, weights, adapter)
    # What must be there as a whole: layers that look into the modules below them, as DoRA does at its base's weight.
    whole = {type(m).__name__ for m in model.modules() if isinstance(m, (BaseTunerLayer, TrainableTokensWrapper))}
    attach_align_device_hook(
        model,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=_Named(model, weights, adapter),
        preload_module_classes=[*whole, *(own._no_split_modules or ())],
    )


def _set_buffers(model: nn.Module, weights: LazyWeights, adapter: Mapping[str, torch.Tensor]) -> None:
    """Read the buffers that the files have, for good: they are small, and hooks leave them alone."""
    for name, buffer in list(model.named_buffers()):
        if name in adapter:
            value = adapter[name]
        elif own_name(name) in weights:
            value = weights[own_name(name)]
        elif buffer.device.type == "meta":
            # What peft notes of the base when it puts an adapter in, to take it out again.
            value = torch.zeros_like(buffer, device="cpu")
        else:
            continue
        set_module_tensor_to_device(model, name, "cpu", value=value)


class MergeAndRound(ModelHook):  # type: ignore[misc]
    """Lets peft merge its adapter into the weights of a module, and rounds these as the merged files do."""

    def __init__(self, name: str, merged: LazyWeights) -> None:
        self._name = name
        self._merged = merged

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Merge and round."""
        for layer in _tuner_layers(module):
            layer.merge()
        for own, tensor in loaded(self._name, module):
            if own in self._merged and tensor.is_floating_point():
                tensor.data = tensor.data.to(self._merged.stored_dtype(own)).float()
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Forget that anything was merged: the weights are gone."""
        for layer in _tuner_layers(module):
            layer.merged_adapters.clear()
        return output


def attach_merging(model: PeftModel, merged: LazyWeights) -> None:
    """Let a model that `attach` was called for compute as if its adapter were merged and stored as in `merged`."""
    for name, module in list(hooked(model)):
        add_hook_to_module(module, MergeAndRound(name, merged), append=True)


def hooked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules, with their names, that `attach` gave a hook."""
    return ((name, module) for name, module in model.named_modules() if "_hf_hook" in module.__dict__)


def loaded(name: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a module that are in memory now, by their names in the model without peft."""
    for own, tensor in module.named_parameters():
        if tensor.device.type != "meta":
            yield own_name(f"{name}.{own}"), tensor


def quantizable(model: PeftModel) -> frozenset[str]:
    """Return the names of the weights of those layers that an adapter acts on, and that bitsandbytes quantizes."""
    head = own_name(next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), ""))
    layers = ((own_name(n), m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    return frozenset(f"{n}.weight" for n, m in layers if isinstance(m.get_base_layer(), nn.Linear) and n != head)


def _tuner_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
