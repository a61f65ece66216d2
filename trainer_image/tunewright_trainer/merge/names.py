"""Which tensor of a checkpoint an adapter means: modules of a loaded model have other names than tensors of files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

UNTRAINED = "original_module"
_PREFIX = "base_model.model."
_PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector.weight",
    "lora_magnitude_vector",
    "ia3_l",
    "token_adapter.trainable_tokens_delta",
    "trainable_tokens_delta",
)
_RENAMES = (
    # transformers loads these under the first name and leaves the second one in files.
    (r"\.mlp\.(gate|experts)\b", r".block_sparse_moe.\1"),
    (r"LayerNorm\.weight$", "LayerNorm.gamma"),
    (r"LayerNorm\.bias$", "LayerNorm.beta"),
    # The head's bias is another name of its parent's.
    (r"\.decoder\.bias$", ".bias"),
    (r"block_sparse_moe\.router\.weight$", "block_sparse_moe.router.layer.weight"),
    (r"block_sparse_moe\.experts\.gate_up_proj$", "block_sparse_moe.input_linear.weight"),
    (r"block_sparse_moe\.experts\.down_proj$", "block_sparse_moe.output_linear.weight"),
)
_MOVES = (
    # A model of text and images, and its language model alone.
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.language_model\.", "model."),
    (r"^model\.", "model.language_model."),
    (r"^model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    # A model saved without the head that it is loaded with.
    (r"^[^.]+\.", ""),
)
_EXPERTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""Stacked weights of experts, and what files call the parts of one expert."""


@dataclass(frozen=True)
class Key:
    """The name of an adapter's tensor, taken apart."""

    module: str
    """Module of the loaded model; for whole tensors, module and parameter."""
    part: str
    """What it is of the adapter's; "" for a whole tensor of the model, UNTRAINED for one that another one replaces."""
    depth: int
    """Number of adapted parameters of the same module that were wrapped before this one."""


def parse_key(name: str) -> Key | None:
    """Take the name of an adapter's tensor apart; None where it is none that peft writes."""
    if not name.startswith(_PREFIX):
        return None
    path = name.removeprefix(_PREFIX)
    for part in _PARTS:
        if path.endswith(f".{part}"):
            module = path.removesuffix(f".{part}").removesuffix(".token_adapter.base_layer")
            depth = 0
            while module.endswith(".base_layer"):
                module, depth = module.removesuffix(".base_layer"), depth + 1
            return Key(module, part.removesuffix(".weight").removeprefix("token_adapter."), depth)
    if re.search(r"\.original_module\.(weight|bias)$", path):
        return Key(path, UNTRAINED, 0)
    return Key(re.sub(r"(\.token_adapter)?\.(base_layer|modules_to_save)\.(weight|bias)$", r".\3", path), "", 0)


class Names:
    """Finds the tensors of one checkpoint."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._roots = sorted({name.partition(".")[0] for name in self._names})

    def find(self, path: str) -> str | None:
        """Return the tensor that holds a parameter of the loaded model, None where no tensor does."""
        for moved in self._moved(path):
            for candidate in _renamed(moved):
                if candidate in self._names:
                    return candidate
        return None

    def find_experts(self, path: str) -> Mapping[int, tuple[str, ...]] | None:
        """Return the tensors that stacked weights of experts are split into, by expert; None where they are not.

        For gate_up_proj, these are two of each expert, whose outputs follow one another.
        """
        container, _, last = path.rpartition(".")
        for moved in self._moved(f"{container}."):
            for holder in _renamed(moved):
                for parts in _EXPERTS.get(last, ()):
                    found = self._experts_of(holder.rstrip("."), parts)
                    if found:
                        return found
        return None

    def _experts_of(self, container: str, parts: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
        found: dict[int, tuple[str, ...]] = {}
        while all(f"{container}.{len(found)}.{part}.weight" in self._names for part in parts):
            number = len(found)
            found[number] = tuple(f"{container}.{number}.{part}.weight" for part in parts)
        return found

    def _moved(self, path: str) -> Iterator[str]:
        yield path
        for pattern, replacement in _MOVES:
            if re.search(pattern, path):
                yield re.sub(pattern, replacement, path)
        for root in self._roots:
            yield f"{root}.{path}"


def _renamed(path: str) -> Iterator[str]:
    yield path
    for pattern, replacement in _RENAMES:
        if re.search(pattern, path):
            yield re.sub(pattern, replacement, path)
