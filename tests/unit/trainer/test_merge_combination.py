"""Which adapters can be combined, as far as their configurations tell: said by name, before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright_api.v1alpha1.adaptermerge import CombinationType
from tunewright_trainer.errors import InvalidAdapter, InvalidConfiguration
from tunewright_trainer.merge.combination import (
    Combination,
    check_combination,
    highest_rank,
    rank_and_scale,
)

PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj"],
    "bias": "none",
    "init_lora_weights": True,
}
TYPES: tuple[CombinationType, ...] = ("Linear", "Concatenate", "SVD", "TIES", "DARE", "MagnitudePrune")


def check(*changes: dict[str, Any], kind: CombinationType = "Linear", **combination: Any) -> None:
    """Check adapters that differ from a plain one."""
    configs = [(f"adapter-{index}", {**PLAIN, **change}) for index, change in enumerate(changes)]
    given = {"weights": [1.0] * len(configs), **combination}
    check_combination(configs, Combination(type=kind, **given))


@pytest.mark.parametrize("kind", TYPES)
def test_equal_adapters_go_with_every_type(kind: CombinationType) -> None:
    """Other alphas, targets and rsLoRA are no hindrance, and weights may be negative."""
    check({}, {"lora_alpha": 3, "target_modules": ["v_proj"], "use_rslora": True}, kind=kind, weights=[1.0, -0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "adapter-1 is an adapter of kind 'IA3': only LoRA"),
        ({"use_dora": True}, "adapter-1 has DoRA"),
        ({"modules_to_save": ["lm_head"]}, "adapter-1 has whole trained modules"),
        ({"bias": "all"}, r"adapter-1 has trained biases of the base model \(bias 'all'\)"),
        ({"lora_bias": True}, "adapter-1 has trained biases in its LoRA layers"),
        ({"trainable_token_indices": [1]}, "adapter-1 has embeddings of single tokens"),
        ({"target_parameters": ["experts.w"]}, "adapter-1 has LoRA on parameters"),
        ({"layer_replication": [[0, 2]]}, "adapter-1 has layers of the base model that are repeated"),
        ({"init_lora_weights": "pissa"}, "adapter-1 has a base model of its own"),
        ({"r": 0}, "adapter-1 has rank 0"),
        ({"base_model_name_or_path": "org/other"}, "different base models: 'org/base' that of adapter-0, 'org/other'"),
        ({"task_type": "SEQ_CLS"}, "different task types"),
    ],
)
@pytest.mark.parametrize("kind", TYPES)
def test_what_would_get_lost_is_refused_by_name(change: dict[str, Any], message: str, kind: CombinationType) -> None:
    """The adapter, what it has, and what to do instead; whatever the type is."""
    with pytest.raises(InvalidAdapter, match=message):
        check({}, change, kind=kind)


def test_starts_that_leave_the_base_alone_are_fine() -> None:
    """Such adapters are plain ones once they are trained; so is a base with a slash at its end."""
    check({"init_lora_weights": "gaussian"}, {"base_model_name_or_path": "org/base/"})


@pytest.mark.parametrize("kind", TYPES)
def test_different_ranks_name_adapters_and_remedy(kind: CombinationType) -> None:
    """Factors of different ranks cannot be added, but concatenated and decomposed; a pattern's rank counts as well."""
    for other in ({"r": 8}, {"rank_pattern": {"v_proj": 32}}):
        if kind in ("Concatenate", "SVD"):
            check({}, other, kind=kind)
            continue
        with pytest.raises(InvalidAdapter, match=rf"{kind} adds factors .* 16 \(adapter-0\), .*use Concatenate.* SVD"):
            check({}, other, kind=kind)


@pytest.mark.parametrize(
    ("kind", "adapters", "values", "message"),
    [
        ("Linear", 2, {"weights": [1.0]}, "1 weights for 2 adapters"),
        ("Linear", 2, {"weights": [1.0, float("nan")]}, "weights 1, nan: a weight must be a finite number"),
        ("Linear", 2, {"weights": [0.0, 0.0]}, "the weights 0, 0 sum to nothing"),
        ("TIES", 2, {"weights": [0.3, -0.3]}, "the weights 0.3, -0.3 sum to nothing"),
        ("SVD", 1, {}, "SVD is for several adapters"),
        ("Linear", 2, {"density": 0.5}, "density is for TIES, DARE, MagnitudePrune, the type is Linear"),
        ("TIES", 2, {"density": 0.0}, "density is 0: it must be above 0 and at most 1"),
        ("DARE", 2, {"density": 1.5}, r"density is 1\.5"),
        ("Linear", 2, {"svd_rank": 4}, "svdRank is for SVD, the type is Linear"),
        ("SVD", 2, {"svd_rank": 0}, "svdRank is 0: it must be at least 1"),
        ("SVD", 2, {"svd_rank": 33}, "svdRank is 33, but the ranks of the adapters sum to 32"),
    ],
)
def test_values_that_cannot_work(kind: CombinationType, adapters: int, values: dict[str, Any], message: str) -> None:
    """The combination's own numbers are checked against its type and the adapters."""
    with pytest.raises(InvalidConfiguration, match=message):
        check(*[{}] * adapters, kind=kind, **values)


def test_half_is_kept_where_nothing_else_is_said() -> None:
    """The default is part of the type, so that results do not depend on who asks."""
    assert Combination(type="TIES", weights=[1.0]).kept_share == 0.5
    assert Combination(type="TIES", weights=[1.0], density=0.2).kept_share == 0.2


def test_a_layers_rank_and_scale() -> None:
    """The first pattern that a layer's name ends with, from a dot on, as in peft; else the adapter's own."""
    config = {
        **PLAIN,
        "rank_pattern": {"layers.1.self_attn.v_proj": 4, "v_proj": 64},
        "alpha_pattern": {r"layers\.\d.self_attn.v_proj": 8},
    }
    assert rank_and_scale(config, "model.layers.1.self_attn.v_proj") == (4, 2.0)
    assert rank_and_scale(config, "model.layers.0.self_attn.v_proj") == (64, 0.125)
    assert rank_and_scale(config, "model.layers.0.self_attn.my_v_proj") == (16, 2.0)
    assert rank_and_scale({**config, "use_rslora": True}, "q_proj") == (16, 8.0)
    assert highest_rank(config) == 64
