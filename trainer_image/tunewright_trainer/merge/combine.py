"""The process that makes one LoRA adapter of several: `python -m tunewright_trainer.merge.combine TASK.json`.

Layer by layer and without the base model: each layer's factors are read, combined by peft's own functions, and put
aside for the result, which is all that memory must hold. The result scales by 1 (alpha is the rank, and rsLoRA is off):
weights and scales of the adapters are in its factors.

Numbers are those of peft's `add_weighted_adapter`, with two differences. SVD decomposes the small product of the
factors instead of the whole layer's change, which is the same decomposition at a thousandth of the cost. DARE draws
from a seed for each layer, so that a layer's result depends neither on the others nor on the order of layers.

Shapes: r rank, I inputs and O outputs of a layer; A_rI and B_Or are the factors of its change B A.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright_trainer.errors import InvalidAdapter, InvalidConfiguration
from tunewright_trainer.merge.child import serve
from tunewright_trainer.merge.combination import (
    OF_EQUAL_RANKS,
    AdapterFolder,
    Combination,
    CombineResult,
    CombineTask,
    check_combination,
    different_ranks,
    highest_rank,
    rank_and_scale,
)

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(_PREFIX)}(?P<layer>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB]))")
_EMBEDDING = re.compile(rf"{re.escape(_PREFIX)}(?!.*\.lora_).+\.weight")
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|chat_template.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|spiece\.model"
)
Pair = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Factors:
    """What one adapter has for one layer."""

    owner: str
    a_rI: torch.Tensor  # noqa: N815  # shape suffix
    b_Or: torch.Tensor  # noqa: N815
    scale: float
    weight: float


class AdapterFile:
    """An adapter's factors by layer; nothing is read before it is asked for."""

    def __init__(self, folder: AdapterFolder, config: Mapping[str, Any]) -> None:
        """Read the names of the tensors.

        Raises:
            InvalidAdapter: The file is missing or damaged, or has tensors that are no factors of a layer.
        """
        from safetensors import SafetensorError, safe_open

        self.uri = folder.uri
        self.config = config
        path = folder.path / WEIGHTS
        if not path.is_file():
            raise InvalidAdapter(f"{self.uri}: no {WEIGHTS}: {_instead(folder.path)}")
        try:
            # Any: not all of its methods have types.
            opened: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InvalidAdapter(f"{self.uri}/{WEIGHTS}: damaged or truncated: {error}") from None
        self._file = opened
        self.names: dict[str, dict[str, str]] = {}
        """Names of the tensors by layer and side."""
        self.embeddings: set[str] = set()
        """Tensors of the base model's embeddings, which peft saves along when an adapter has to do with them."""
        for name in opened.keys():  # noqa: SIM118  # no mapping
            self._add(name)

    def _add(self, name: str) -> None:
        found = _FACTOR.fullmatch(name)
        if found is None and _EMBEDDING.fullmatch(name):
            self.embeddings.add(name)
            return
        if found is None:
            raise InvalidAdapter(
                f"{self.uri}: tensor {name} is no factor of a LoRA layer and cannot be combined: merge the adapter "
                "into the base model by itself"
            )
        self.names.setdefault(found["layer"], {})[found["side"] or found["table"]] = name

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        read: torch.Tensor = self._file.get_tensor(name)
        return read

    def factors(self, layer: str, weight: float) -> Factors:
        """Read one layer, as float32, which is what peft computes in.

        Raises:
            InvalidAdapter: A factor is missing, not finite, or of another shape than the configuration says.
        """
        names = self.names[layer]
        if set(names) != {"A", "B"}:
            raise InvalidAdapter(f"{self.uri}: {layer} has only one of its two factors: {', '.join(names.values())}")
        a, b = (self.tensor(names[side]).float() for side in "AB")
        rank, scale = rank_and_scale(self.config, layer)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise InvalidAdapter(
                f"{self.uri}: the factors of {layer} have shapes {tuple(a.shape)} and {tuple(b.shape)}; those of a "
                f"layer with rank {rank} are ({rank}, inputs) and (outputs, {rank})"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise InvalidAdapter(f"{self.uri}: {layer} has values that are no finite numbers")
        return Factors(self.uri, a, b, scale, weight)


def combine(task: CombineTask) -> CombineResult:
    """Write the one adapter: configuration, weights, and the first adapter's tokenizer and chat template.

    Raises:
        InvalidAdapter: An adapter is damaged, cannot be combined, or does not go with another one.
        InvalidConfiguration: The combination is not possible, or would change nothing.
    """
    import torch
    from safetensors.torch import save_file

    # Sums of several threads differ with their number, and so with the machine.
    torch.set_num_threads(1)
    combination = task.combination
    configs = [(adapter.uri, _read_config(adapter)) for adapter in task.adapters]
    check_combination(configs, combination)
    files = [AdapterFile(adapter, config) for adapter, (_, config) in zip(task.adapters, configs, strict=True)]
    layers = sorted({layer for file in files for layer in file.names})
    rank = _new_rank([config for _, config in configs], combination)
    tensors: dict[str, torch.Tensor] = {}
    has_effect = False
    for layer in layers:
        # Whose names they are makes no difference: a layer has the same ones in all adapters.
        names = next(file.names[layer] for file in files if layer in file.names)
        a, b = tensors[names["A"]], tensors[names["B"]] = _combined(layer, files, combination, rank)
        has_effect |= bool(a.any()) and bool(b.any())
    if not has_effect:
        raise InvalidConfiguration(
            f"combination.type {combination.type} leaves nothing of the adapters: every value of the result is 0. "
            "Raise combination.density, or check the adapters' weights"
        )
    tensors.update(_embeddings(files))
    task.output.mkdir(parents=True)
    save_file(tensors, task.output / WEIGHTS, metadata={"format": "pt"})
    config = _new_config([config for _, config in configs], layers, rank)
    (task.output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _copy_tokenizer(task.adapters[0].path, task.output)
    return CombineResult(
        rank=rank,
        modules=len(layers),
        partial={file.uri: missing for file in files if (missing := len(layers) - len(file.names))},
        versions={name: version(name) for name in ("peft", "torch")},
    )


def _combined(layer: str, files: Sequence[AdapterFile], combination: Combination, rank: int) -> Pair:
    """Combine one layer; an adapter that does not have it adds nothing, as in peft."""
    import torch

    found = [
        file.factors(layer, weight)
        for file, weight in zip(files, combination.weights, strict=True)
        if layer in file.names
    ]
    _check_shapes(layer, found, combination)
    if combination.type == "Concatenate":
        a, b = _concatenated(found)
    elif combination.type == "SVD":
        a, b = _decomposed(found, rank)
    else:
        torch.manual_seed(layer_seed(combination.seed, layer))
        a, b = _added(found, combination)
    # The ranks of layers may differ, that of a configuration without patterns does not: zeros change nothing.
    missing = rank - a.shape[0]
    a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    return a.contiguous(), b.contiguous()


def _added(found: Sequence[Factors], combination: Combination) -> Pair:
    """Add the factors one by one; the root of weight and scale goes into each, the sign into one of them."""
    import warnings

    import torch
    from peft.utils.merge_utils import dare_linear, magnitude_prune, task_arithmetic, ties

    totals = [factors.weight * factors.scale for factors in found]
    roots = [math.sqrt(abs(total)) for total in totals]
    weights_a = torch.tensor([-root if total < 0 else root for root, total in zip(roots, totals, strict=True)])
    sides = (
        ([factors.a_rI for factors in found], weights_a),
        ([factors.b_Or for factors in found], torch.tensor(roots)),
    )
    if combination.type == "Linear":
        a, b = (task_arithmetic(side, weights) for side, weights in sides)
        return a, b
    method = {"TIES": ties, "DARE": dare_linear, "MagnitudePrune": magnitude_prune}[combination.type]
    with warnings.catch_warnings():
        # Density 1 prunes nothing, which peft thinks worth a warning.
        warnings.filterwarnings("ignore", message="The density")
        a, b = (method(side, weights, combination.kept_share) for side, weights in sides)
    return a, b


def _concatenated(found: Sequence[Factors]) -> Pair:
    import torch

    a = torch.cat([factors.a_rI * factors.weight * factors.scale for factors in found], dim=0)
    return a, torch.cat([factors.b_Or for factors in found], dim=1)


def _decomposed(found: Sequence[Factors], rank: int) -> Pair:
    """Return the best approximation of the weighted sum at a rank.

    The sum is B A of the concatenated factors. With B = Q R and A^T = P S, the decomposition U D V^T of the small R S^T
    makes (Q U) D (P V)^T that of the sum. Q, P, U and V are orthogonal.
    """
    import torch

    a, b = (factor.double() for factor in _concatenated(found))
    q, r = torch.linalg.qr(b)
    p, s = torch.linalg.qr(a.T)
    u, d, vt = torch.linalg.svd(r @ s.T, full_matrices=False)
    return (vt[:rank] @ p.T).float(), (q @ u[:, :rank] * d[:rank]).float()


def _embeddings(files: Sequence[AdapterFile]) -> dict[str, torch.Tensor]:
    """Return the embeddings that adapters bring along; they belong to the base model, so they must be the same ones.

    Raises:
        InvalidAdapter: They are not.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    for file in files:
        for name in file.embeddings:
            tensor = file.tensor(name)
            if not torch.equal(found.setdefault(name, tensor), tensor):
                raise InvalidAdapter(
                    f"{file.uri} has other values of {name.removeprefix(_PREFIX)} than the adapters before it: trained "
                    "or resized embeddings cannot be combined; merge the adapter into the base model by itself"
                )
    return found


def layer_seed(seed: int, layer: str) -> int:
    """Return the seed that DARE draws with for a layer."""
    return int.from_bytes(hashlib.sha256(f"{seed} {layer}".encode()).digest()[:8], "big") >> 1


def _check_shapes(layer: str, found: Sequence[Factors], combination: Combination) -> None:
    first = found[0]
    for other in found[1:]:
        if (other.a_rI.shape[1], other.b_Or.shape[0]) != (first.a_rI.shape[1], first.b_Or.shape[0]):
            raise InvalidAdapter(
                f"{layer} has {first.a_rI.shape[1]} inputs and {first.b_Or.shape[0]} outputs in {first.owner}, "
                f"{other.a_rI.shape[1]} and {other.b_Or.shape[0]} in {other.owner}: they are adapters of different "
                "models"
            )
    ranks = [factors.a_rI.shape[0] for factors in found]
    if combination.type in OF_EQUAL_RANKS and len(set(ranks)) > 1:
        raise InvalidAdapter(different_ranks([f.owner for f in found], ranks, combination.type, f" in {layer}"))


def _new_rank(configs: Sequence[Mapping[str, Any]], combination: Combination) -> int:
    ranks = [highest_rank(config) for config in configs]
    if combination.type == "Concatenate":
        return sum(ranks)
    return combination.svd_rank or max(ranks)


def _new_config(configs: Sequence[Mapping[str, Any]], layers: Iterable[str], rank: int) -> dict[str, Any]:
    """Return the first adapter's configuration with the rank and the layers of the one adapter."""
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    nowhere = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    no_start = dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"))
    targets = _targets(configs, layers)
    own = {"r": rank, "lora_alpha": rank, "target_modules": targets, "inference_mode": True}
    return {**configs[0], **plain, **nowhere, **no_start, **own}


def _targets(configs: Sequence[Mapping[str, Any]], layers: Iterable[str]) -> list[str]:
    """Return the union of the adapters' targets; the layers one by one where an adapter leaves some of its targets out.

    With short names of one adapter and another one's limit to some layers, peft would look for layers that are not
    there.
    """
    limits = ("layers_to_transform", "exclude_modules")
    limited = any(isinstance(config.get("target_modules"), str) for config in configs)
    if limited or any(config.get(limit) is not None for config in configs for limit in limits):
        return sorted(layers)
    return sorted({name for config in configs for name in config.get("target_modules") or ()})


def _read_config(adapter: AdapterFolder) -> dict[str, Any]:
    try:
        config = json.loads((adapter.path / CONFIG).read_bytes())
    except FileNotFoundError:
        raise InvalidAdapter(f"{adapter.uri}: no {CONFIG}: this is not the folder of an adapter") from None
    except ValueError as error:
        raise InvalidAdapter(f"{adapter.uri}/{CONFIG}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{adapter.uri}/{CONFIG}: must be a JSON object")
    return config


def _instead(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return "the weights are a pickle (adapter_model.bin), which is never loaded: save them as safetensors"
    return f"there are {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'no files'}"


def _copy_tokenizer(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and _TOKENIZER_FILES.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    sys.exit(serve(CombineTask, combine))
