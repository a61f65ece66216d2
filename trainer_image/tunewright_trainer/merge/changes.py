"""What an adapter changes of a base model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tunewright_trainer.errors import InvalidAdapter
from tunewright_trainer.merge.adapter import Adapter, equal_tensors
from tunewright_trainer.merge.edits import (
    AddVector,
    Edit,
    EightBitRounding,
    ExpertLowRank,
    FourBitRounding,
    LowRank,
    Magnitude,
    Part,
    Rows,
    Scale,
)
from tunewright_trainer.merge.names import UNTRAINED, Names, parse_key
from tunewright_trainer.merge.sources import Source, Stored

HEADS = (
    "lm_head.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "language_model.lm_head.weight",
)
"""Parameters that many models share with their input embedding, so that files have no tensor for them."""
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
_RESIZED = (*_EMBEDDINGS, "lm_head", "decoder", "embed_out", "score", "classifier", "out_proj")
"""Modules whose first dimension is a vocabulary or the outputs of a classifier, which may be others than the base's."""
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Layers of these model types that keep the inputs as rows of their weight."""
_TRANSPOSED_EXPERTS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Model types whose stacked experts do the same."""
_WRAP_ORDER = ("gate_up_proj", "down_proj")
"""The order in which peft wraps the parameters of one module: that of the module."""
_LORA = frozenset({"lora_A", "lora_B"})
_LORA_EXTRAS = frozenset({"lora_B.bias", "lora_magnitude_vector"})
_EMBEDDING_LORA = frozenset({"lora_embedding_A", "lora_embedding_B"})
_MATRIX, _STACK = 2, 3


@dataclass(frozen=True)
class BaseQuantization:
    """How the base was quantized when the adapter was trained, for merging into what the adapter saw."""

    bits: Literal[4, 8] = 4
    type: Literal["NF4", "FP4"] = "NF4"
    double_quant: bool = True


@dataclass
class Change:
    """What becomes of one tensor."""

    base: Source | None
    """The base's tensor; for an output head that shares the embedding's, that one."""
    replacement: Source | None = None
    """The adapter's own tensor, which takes the place of the base's before any edit."""
    edits: list[Edit] = field(default_factory=list)
    rows: int | None = None
    """Rows of the matrix that the edits see. Default: all dimensions but the last."""
    tensors: dict[str, str] = field(default_factory=dict)
    """The adapter's tensors by what they are, for comparing tied ones."""

    @property
    def source(self) -> Source:
        """What the edits start from."""
        source = self.replacement or self.base
        assert source is not None, "only a replacement may have no base"
        return source


class Changes:
    """The tensors of an adapter, resolved against those of a base model."""

    def __init__(
        self,
        base: Mapping[str, Source],
        model_type: str,
        adapter: Adapter,
        dequantized: BaseQuantization | None,
        place: str,
    ) -> None:
        """Resolve everything.

        Args:
            base: The base's tensors.
            model_type: Of the base's configuration.
            adapter: The adapter.
            dequantized: Round the tensors that the adapter targets like this first.
            place: Name of the base in messages.

        Raises:
            InvalidAdapter: The adapter is not one of this base, or does what is not supported.
        """
        self.by_tensor: dict[str, Change] = {}
        """By name of the base's tensor, or of the loaded model's parameter where the base has none."""
        self._base, self._model_type, self._adapter = base, model_type, adapter
        self._dequantized, self._place = dequantized, place
        self._names = Names(base)
        self.embedding = next((name for name in base if _is_embedding(name)), None)
        """The tensor of the input embedding."""
        groups: dict[tuple[str, int], dict[str, str]] = {}
        for name in adapter.tensors:
            key = parse_key(name)
            if key is None:
                raise InvalidAdapter(f"{adapter.uri}: tensor {name} has no name that peft gives")
            if key.part == UNTRAINED:
                continue
            if key.part:
                groups.setdefault((key.module, key.depth), {})[key.part] = name
            else:
                self._replace(key.module, name)
        for (module, depth), parts in groups.items():
            self._edit(module, depth, parts)

    def _replace(self, path: str, name: str) -> None:
        tensor = self._adapter.tensors[name]
        change = self._change(path, name, may_be_new=self._is_kept(path))
        if change.base is not None and change.base.shape != tensor.shape:
            same_inputs = change.base.shape[1:] == tensor.shape[1:] and len(change.base.shape) == len(tensor.shape)
            if not same_inputs or _last(path.rpartition(".")[0]) not in _RESIZED:
                raise self._misfit(name, path, change.base.shape)
        other = change.tensors.setdefault("whole", name)
        if other != name and not equal_tensors(self._adapter, name, other):
            raise InvalidAdapter(f"{self._adapter.uri}: {name} and {other} are two versions of {path}")
        change.replacement = Stored(self._adapter.reader, tensor)

    def _is_kept(self, path: str) -> bool:
        """Tell whether a parameter belongs to a module that was trained as a whole."""
        return any(f".{module}." in f".{path}" for module in self._adapter.config.get("modules_to_save") or ())

    def _edit(self, module: str, depth: int, parts: Mapping[str, str]) -> None:
        kinds = frozenset(parts)
        if "trainable_tokens_delta" in kinds:
            others = {part: name for part, name in parts.items() if part != "trainable_tokens_delta"}
            if others:
                self._edit(module, depth, others)
            self._edit_rows(module, parts["trainable_tokens_delta"])
        elif kinds == _LORA and (leaf := self._parameter(module, depth)) is not None:
            self._edit_parameter(f"{module}.{leaf}", parts)
        elif kinds >= _LORA and kinds - _LORA <= _LORA_EXTRAS:
            self._edit_linear(module, parts)
        elif kinds >= _EMBEDDING_LORA and kinds - _EMBEDDING_LORA <= {"lora_magnitude_vector"}:
            self._edit_embedding(module, parts)
        elif kinds == {"ia3_l"}:
            self._edit_scale(module, parts["ia3_l"])
        else:
            names = ", ".join(sorted(parts.values()))
            raise InvalidAdapter(f"{self._adapter.uri}: of {module} there is only {names}: tensors are missing")

    def _edit_linear(self, module: str, parts: Mapping[str, str]) -> None:
        path = f"{module}.weight"
        a, b = parts["lora_A"], parts["lora_B"]
        change = self._change(path, a)
        shape, a_shape, b_shape = change.source.shape, self._shape(a), self._shape(b)
        transposed = self._is_conv1d(module)
        wanted = (shape[1], shape[0]) if transposed else (shape[0], *shape[1:])
        self._check_rank(module, a, a_shape[0])
        if (*a_shape[1:],) != wanted[1:]:
            raise self._misfit(a, path, shape)
        if b_shape[:2] != (wanted[0], a_shape[0]):
            raise self._misfit(b, path, shape)
        self._round_first(change, module)
        change.edits.append(LowRank(self._adapter, a, b, self._adapter.scale_of(module), transposed=transposed))
        change.rows = shape[0]
        change.tensors.update(parts)
        if "lora_magnitude_vector" in parts:
            self._add_magnitude(change, module, parts["lora_magnitude_vector"], wanted[0], by_column=transposed)
        if "lora_B.bias" in parts:
            bias = self._change(f"{module}.bias", parts["lora_B.bias"])
            bias.edits.append(AddVector(self._adapter, parts["lora_B.bias"], self._adapter.scale_of(module)))

    def _edit_embedding(self, module: str, parts: Mapping[str, str]) -> None:
        path = f"{module}.weight"
        a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
        change = self._change(path, a)
        shape, (rank, tokens), (width, _) = change.source.shape, self._shape(a), self._shape(b)
        self._check_rank(module, a, rank)
        if (tokens, width) != shape:
            raise self._misfit(a if tokens != shape[0] else b, path, shape)
        change.edits.append(LowRank(self._adapter, a, b, self._adapter.scale_of(module), transposed=True))
        change.tensors.update(parts)
        if "lora_magnitude_vector" in parts:
            self._add_magnitude(change, module, parts["lora_magnitude_vector"], width, by_column=True)

    def _add_magnitude(self, change: Change, module: str, name: str, outputs: int, *, by_column: bool) -> None:
        if max(self._shape(name)) != outputs:
            raise self._misfit(name, f"{module}.weight", change.source.shape)
        change.edits.append(Magnitude(self._adapter, name, by_column=by_column))

    def _edit_scale(self, module: str, name: str) -> None:
        path = f"{module}.weight"
        change = self._change(path, name)
        shape, factors, transposed = change.source.shape, self._shape(name), self._is_conv1d(module)
        if len(shape) != _MATRIX or len(factors) != _MATRIX:
            raise InvalidAdapter(f"{self._adapter.uri}: {module} is a convolution: its IA3 is not merged here")
        # Feed-forward layers have their inputs multiplied, all others their outputs.
        inputs = factors[0] == 1
        by_column = inputs != transposed
        if max(factors) != shape[1 if by_column else 0]:
            raise self._misfit(name, path, shape)
        self._round_first(change, module)
        change.edits.append(Scale(self._adapter, name, by_column=by_column))
        bias = self._names.find(f"{module}.bias")
        if bias is not None and not inputs:
            self._change(f"{module}.bias", name).edits.append(Scale(self._adapter, name, by_column=True))

    def _edit_rows(self, module: str, name: str) -> None:
        path = f"{module}.weight"
        change = self._change(path, name)
        numbers = self._token_numbers(module, name)
        shape = change.source.shape
        if self._shape(name) != (len(numbers), *shape[1:]) or not all(0 <= n < shape[0] for n in numbers):
            raise self._misfit(name, path, shape)
        change.edits.append(Rows(self._adapter, name, numbers))
        change.tensors["rows"] = name

    def _token_numbers(self, module: str, name: str) -> Sequence[int]:
        config = self._adapter.config
        numbers = config.get("trainable_token_indices") or config.get("token_indices")
        if isinstance(numbers, dict):
            numbers = next((n for key, n in numbers.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(numbers, list):
            raise InvalidAdapter(f"{self._adapter.uri}: the configuration does not say which tokens {name} has")
        return numbers

    def _edit_parameter(self, path: str, parts: Mapping[str, str]) -> None:
        """Resolve an adapter of a parameter that is no layer's weight: of stacked experts, most often."""
        a, b = parts["lora_A"], parts["lora_B"]
        target = self._names.find(path)
        split = None if target is not None else self._names.find_experts(path)
        shape = self._base[target].shape if target is not None else ()
        experts = len(split) if split is not None else shape[0] if len(shape) == _STACK else 1
        self._check_rank(path, a, self._shape(a)[0], experts)
        if target is None and split is None:
            raise self._foreign(a, path)
        for name, part in _parts(target, split, experts, self._shape(b)[0]):
            change = self._change(name, a)
            transposed = split is None and experts > 1 and self._model_type in _TRANSPOSED_EXPERTS
            outputs = part.outputs.stop - part.outputs.start
            sides = (self._shape(a)[1], outputs) if transposed else (outputs, self._shape(a)[1])
            if change.source.shape[-2:] != sides:
                raise self._misfit(a, name, change.source.shape)
            scale = self._adapter.scale_of(path)
            change.edits.append(
                ExpertLowRank(self._adapter, a, b, scale, transposed=transposed, experts=experts, part=part)
            )

    def _parameter(self, module: str, depth: int) -> str | None:
        """Return which parameter of a module an adapter of parameters belongs to; None where it is one of a layer."""
        targets = self._adapter.config.get("target_parameters") or ()
        leaves = {_last(t) for t in targets if f".{module}.{_last(t)}".endswith(f".{t}")}
        leaves = {leaf for leaf in leaves if self._holds(f"{module}.{leaf}")}
        wrapped = [leaf for leaf in _WRAP_ORDER if leaf in leaves] if len(leaves) > 1 else list(leaves)
        if len(wrapped) != len(leaves):
            raise InvalidAdapter(
                f"{self._adapter.uri}: several parameters of {module} are adapted ({', '.join(sorted(leaves))}), and "
                "files do not say which tensor belongs to which"
            )
        return wrapped[-1 - depth] if depth < len(wrapped) else None

    def _holds(self, path: str) -> bool:
        return self._names.find(path) is not None or self._names.find_experts(path) is not None

    def _round_first(self, change: Change, module: str) -> None:
        """Round the base's numbers as they were in training, where that is asked for and was so."""
        if self._dequantized is None or change.base is None or not change.base.is_plain or f"{module}.weight" in HEADS:
            return
        if self._is_conv1d(module) or len(change.base.shape) != _MATRIX:
            raise InvalidAdapter(
                f"{self._adapter.uri}: {module} is no linear layer of the usual layout, so it cannot be merged into "
                "the dequantized base: set quantizedBase to Original"
            )
        how, dtype = self._dequantized, change.base.dtype
        change.edits.append(
            FourBitRounding(how.type, dtype, double_quant=how.double_quant)
            if how.bits == 4
            else EightBitRounding(dtype)
        )

    def _change(self, path: str, name: str, *, may_be_new: bool = False) -> Change:
        """Return the change of a parameter's tensor; `name` is the adapter's tensor that needs it."""
        target = self._names.find(path) or path
        if target not in self.by_tensor:
            source = self._base.get(target)
            if source is None and path in HEADS and self.embedding is not None:
                source = self._base[self.embedding]
            if source is None and not may_be_new:
                raise self._foreign(name, path)
            self.by_tensor[target] = Change(source)
        return self.by_tensor[target]

    def _check_rank(self, module: str, name: str, found: int, experts: int = 1) -> None:
        rank = self._adapter.rank_of(module)
        if found != rank * experts:
            raise InvalidAdapter(
                f"{self._adapter.uri}: tensor {name} has rank {found / experts:g}, the configuration says {rank}: the "
                "two files do not belong together"
            )

    def _is_conv1d(self, module: str) -> bool:
        return self._model_type in _CONV1D_FAMILIES and _last(module) in _CONV1D_LAYERS

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._adapter.tensors[name].shape

    def _foreign(self, name: str, path: str) -> InvalidAdapter:
        return InvalidAdapter(
            f"{self._adapter.uri}: tensor {name} is one for {path}, which {self._place} does not have: the adapter was "
            f"trained on another model ({self._adapter.config.get('base_model_name_or_path')})"
        )

    def _misfit(self, name: str, path: str, shape: Sequence[int]) -> InvalidAdapter:
        return InvalidAdapter(
            f"{self._adapter.uri}: tensor {name} of shape {list(self._shape(name))} does not fit {path} of shape "
            f"{list(shape)} in {self._place}: the adapter was trained on another model "
            f"({self._adapter.config.get('base_model_name_or_path')})"
        )


def _parts(
    target: str | None, split: Mapping[int, tuple[str, ...]] | None, experts: int, outputs: int
) -> list[tuple[str, Part]]:
    """Return the tensors that hold a parameter, each with its part of it."""
    if target is not None:
        return [(target, Part(range(experts), slice(0, outputs)))]
    assert split is not None
    found = []
    for expert, names in split.items():
        step = outputs // len(names)
        found += [(name, Part((expert,), slice(n * step, (n + 1) * step))) for n, name in enumerate(names)]
    return found


def _is_embedding(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last == "weight" and _last(module) in _EMBEDDINGS and not ("vis" in module or "audio" in module)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
