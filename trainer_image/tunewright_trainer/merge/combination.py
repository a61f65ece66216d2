"""Several adapters as one: what is asked for, whether it can be done, and the process that does it (combine.py).

What peft itself combines and how it does so is the measure; what it would drop without a word (heads, biases, DoRA's
magnitudes) is refused here by name, from the adapters' configurations alone.

A combination makes one pair of factors A and B of each layer's pairs; what the pair changes is B A, scaled:

Linear           weighted sums of the A and of the B: cheap, but products of one adapter's A with another's B come in
Concatenate      all A and all B side by side: exactly the weighted sum of the changes; the rank is the sum of the ranks
SVD              the best approximation of that sum at `svd_rank`
TIES             Linear over the largest `density` of each factor's values, less those of the minority's sign
DARE             Linear over a random `density` of each factor's values, the others' share made up for
MagnitudePrune   Linear over the largest `density` of each factor's values
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from tunewright_api.v1alpha1.adaptermerge import DEFAULT_DENSITY, WITH_DENSITY, CombinationType
from tunewright_trainer.errors import InvalidAdapter, InvalidConfiguration
from tunewright_trainer.merge.child import Step, run_child
from tunewright_trainer.run_log import RunLog
from tunewright_trainer.transfer import Stop

OF_EQUAL_RANKS = ("Linear", *WITH_DENSITY)
PEFT_DEFAULT_RANK = 8
PEFT_DEFAULT_ALPHA = 8
"""Of a configuration that does not name them."""
_STEP = Step(
    "tunewright_trainer.merge.combine", "process that combines the adapters", "combine adapters of lower ranks"
)
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initializations that leave the base model as it is. The others took something out of its weights, so that the adapter
alone is not what was trained."""
_NOT_COMBINED = {
    "use_dora": "DoRA, whose magnitudes belong to its own directions",
    "modules_to_save": "whole trained modules beside its LoRA layers",
    "lora_bias": "trained biases in its LoRA layers",
    "trainable_token_indices": "embeddings of single tokens",
    "target_parameters": "LoRA on parameters that are no layers",
    "layer_replication": "layers of the base model that are repeated",
    "alora_invocation_tokens": "LoRA that acts from certain tokens on",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "a router of its own",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "MonteCLoRA's random parts",
}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Combination(_Document):
    """How adapters become one."""

    type: CombinationType
    weights: list[float]
    """One for each adapter; a negative one takes its change away."""
    density: float | None = None
    """Share of each factor's values that stays, above 0 and at most 1. Default: 0.5, for the types that have one."""
    svd_rank: int | None = None
    """Rank of the result of SVD. Default: the highest rank of the adapters."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of DARE's draws: the same seed gives the same result, bit by bit."""

    @property
    def kept_share(self) -> float:
        """Density with its default."""
        return DEFAULT_DENSITY if self.density is None else self.density


class AdapterFolder(_Document):
    """A LoRA adapter on disk."""

    uri: str
    """Where it came from, for messages."""
    path: Path


class CombineTask(_Document):
    """What the process is told."""

    adapters: list[AdapterFolder]
    combination: Combination
    output: Path
    """Folder for the one adapter; it must not exist yet."""


class CombineResult(_Document):
    """What the process made."""

    rank: int
    modules: int
    """Layers that the one adapter changes."""
    partial: dict[str, int] = Field(default_factory=dict)
    """By adapter, how many of these it does not change itself."""
    versions: dict[str, str]
    """Of the libraries that the result depends on."""


def run_combination(
    task: CombineTask, folder: Path, environment: Mapping[str, str], log: RunLog, stop: Stop | None = None
) -> CombineResult:
    """Combine adapters into one, in a process of its own.

    Args:
        task: Adapters, and where the one goes.
        folder: Work folder, for the files that the process is told by and answers with.
        environment: Of the process, less credentials.
        log: Takes what it prints.
        stop: Ends it when it is requested. Default: it runs to its end.

    Raises:
        WorkerFailure: The adapters cannot be combined; code, reason and message are those of the errors that
            `check_combination` and combine.py raise.
        Killed: The process went over the container's memory limit.
        InternalError: It crashed.
        Preempted: A stop was requested.
    """
    return run_child(_STEP, task, CombineResult, folder, environment, log, stop or Stop())


def check_combination(configs: Sequence[tuple[str, Mapping[str, Any]]], combination: Combination) -> None:
    """Check what can be told from the adapters' configurations, before anything is fetched or started.

    Args:
        configs: Name for messages and content of adapter_config.json, of each adapter.
        combination: What is to be made of them.

    Raises:
        InvalidConfiguration: The combination's own values do not fit its type or the number of adapters.
        InvalidAdapter: An adapter cannot be part of it, or two do not go together.
    """
    _check_values(len(configs), combination)
    for name, config in configs:
        _check_adapter(name, config)
    _check_equal(configs, "base model", _base)
    _check_equal(configs, "task type", lambda config: str(config.get("task_type")))
    _check_ranks(configs, combination)


def highest_rank(config: Mapping[str, Any]) -> int:
    """Return the highest rank of any layer of an adapter."""
    return max(_ranks(config))


def lowest_rank(config: Mapping[str, Any]) -> int:
    """Return the lowest rank of any layer of an adapter; below 1 it is none."""
    return min(_ranks(config))


def _ranks(config: Mapping[str, Any]) -> list[int]:
    return [config.get("r", PEFT_DEFAULT_RANK), *(config.get("rank_pattern") or {}).values()]


def rank_and_scale(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """Return a layer's rank, and what an adapter multiplies the product of its factors with."""
    rank = _of_layer(config.get("rank_pattern"), layer, config.get("r", PEFT_DEFAULT_RANK))
    alpha = _of_layer(config.get("alpha_pattern"), layer, config.get("lora_alpha", PEFT_DEFAULT_ALPHA))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(pattern: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return what a pattern says of a layer: as in peft the first that its name ends with, from a dot on."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Tell whether peft changes the base model's own weights when it loads an adapter."""
    init = config.get("init_lora_weights", True)
    return isinstance(init, str) and init.lower() not in _PLAIN_INITS


def _check_values(adapters: int, combination: Combination) -> None:
    kind, weights, density = combination.type, combination.weights, combination.density
    if len(weights) != adapters:
        raise InvalidConfiguration(f"{len(weights)} weights for {adapters} adapters: give each adapter one")
    if not all(map(math.isfinite, weights)):
        raise InvalidConfiguration(f"weights {_numbers(weights)}: a weight must be a finite number")
    if math.isclose(math.fsum(weights), 0.0, abs_tol=1e-9):
        raise InvalidConfiguration(
            f"the weights {_numbers(weights)} sum to nothing: the combination would take as much away as it adds. Give "
            "at least one adapter a weight, and let the weights not cancel each other out"
        )
    if adapters < 2 and kind != "Linear":
        raise InvalidConfiguration(f"combination.type {kind} is for several adapters: leave it out for a single one")
    if density is not None and kind not in WITH_DENSITY:
        raise InvalidConfiguration(f"combination.density is for {', '.join(WITH_DENSITY)}, the type is {kind}")
    if density is not None and not 0 < density <= 1:
        raise InvalidConfiguration(f"combination.density is {density:g}: it must be above 0 and at most 1")
    if combination.svd_rank is not None and kind != "SVD":
        raise InvalidConfiguration(f"combination.svdRank is for SVD, the type is {kind}")
    if combination.svd_rank is not None and combination.svd_rank < 1:
        raise InvalidConfiguration(f"combination.svdRank is {combination.svd_rank}: it must be at least 1")


def _check_adapter(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InvalidAdapter(f"{name} is an adapter of kind {kind!r}: only LoRA adapters can be combined")
    what = next((text for key, text in _NOT_COMBINED.items() if config.get(key)), None)
    if config.get("bias", "none") != "none":
        what = f"trained biases of the base model (bias {config['bias']!r})"
    elif changes_base(config):
        what = f"a base model of its own (init_lora_weights {config['init_lora_weights']!r} changed its weights)"
    if what is not None:
        raise InvalidAdapter(
            f"{name} has {what}, which cannot be combined: merge it into the base model by itself, or train it without"
        )
    if lowest_rank(config) < 1:
        raise InvalidAdapter(f"{name} has rank {lowest_rank(config)}: it changes nothing")


def _check_equal(
    configs: Sequence[tuple[str, Mapping[str, Any]]], what: str, value: Callable[[Mapping[str, Any]], str]
) -> None:
    first_name, first = configs[0]
    for name, config in configs[1:]:
        if value(config) != value(first):
            raise InvalidAdapter(
                f"the adapters have different {what}s: {value(first)!r} that of {first_name}, {value(config)!r} that "
                f"of {name}. Only adapters of one {what} can be combined"
            )


def _base(config: Mapping[str, Any]) -> str:
    return str(config.get("base_model_name_or_path") or "").rstrip("/")


def _check_ranks(configs: Sequence[tuple[str, Mapping[str, Any]]], combination: Combination) -> None:
    ranks = [highest_rank(config) for _, config in configs]
    if combination.type in OF_EQUAL_RANKS and len(set(ranks)) > 1:
        raise InvalidAdapter(different_ranks([name for name, _ in configs], ranks, combination.type))
    if combination.svd_rank is not None and combination.svd_rank > sum(ranks):
        raise InvalidConfiguration(
            f"combination.svdRank is {combination.svd_rank}, but the ranks of the adapters sum to {sum(ranks)}: the "
            "sum of their changes has no higher rank, and type Concatenate gives it exactly"
        )


def different_ranks(names: Sequence[str], ranks: Sequence[int], kind: CombinationType, place: str = "") -> str:
    """Return the message for adapters whose factors cannot be added, at a place such as a layer."""
    given = ", ".join(f"{rank} ({name})" for name, rank in zip(names, ranks, strict=True))
    return (
        f"combination.type {kind} adds factors of equal rank, the adapters have ranks {given}{place}: use Concatenate, "
        "which takes any and is exact, or SVD, which takes any and keeps the rank low"
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
