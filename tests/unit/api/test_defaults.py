"""Defaults: a pure function of the spec."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api.builders import spec
from tunewright_api.defaults import resolve_evaluation, resolve_hyperparameters, resolve_lora, resolve_objective

METHODS: dict[str, dict[str, Any]] = {
    "Full": {"type": "Full"},
    "LoRA": {"type": "LoRA"},
    "QLoRA": {"type": "QLoRA", "quantization": {}},
}


@pytest.mark.parametrize(("method", "rate"), [("Full", 2e-5), ("LoRA", 2e-4), ("QLoRA", 2e-4)])
def test_adapters_learn_ten_times_as_fast(method: str, rate: float) -> None:
    """The learning rate follows the method."""
    assert resolve_hyperparameters(spec(method=METHODS[method])).learning_rate == rate


@pytest.mark.parametrize(("method", "rate"), [("Full", 1e-6), ("LoRA", 1e-5)])
def test_rewards_move_a_model_slowly(method: str, rate: float) -> None:
    """GRPO starts from a model that answers already; what its rewards are is for the spec to say."""
    given = {"type": "GRPO", "grpo": {"rewards": [{"type": "JSON"}]}}
    document = spec(method=METHODS[method], objective=given)
    assert resolve_hyperparameters(document).learning_rate == rate
    assert resolve_objective(document).document()["grpo"]["generations"] == 8


@pytest.mark.parametrize(
    ("objective", "lora", "dropout"),
    [
        ({"type": "SFT"}, {}, 0.05),
        ({"type": "SFT"}, {"dropout": 0.0}, 0.0),
        ({"type": "PPO", "ppo": {"rewards": [{"type": "JSON"}]}}, {}, 0.0),
    ],
)
def test_dropout_is_usual_but_for_ppo(objective: dict[str, Any], lora: dict[str, Any], dropout: float) -> None:
    """PPO compares likelihoods before and after a step, which dropout would move."""
    resolved = resolve_lora(spec(method={"type": "LoRA", "lora": lora}, objective=objective))
    assert resolved is not None
    assert resolved.dropout == dropout


@pytest.mark.parametrize(
    ("method", "gpus", "optimizer", "checkpointing", "norm"),
    [
        ("LoRA", 1, "AdamW", True, 1.0),
        ("LoRA", 0, "AdamW", False, 1.0),
        ("QLoRA", 1, "PagedAdamW8bit", True, 0.3),
        ("QLoRA", 0, "AdamW", False, 0.3),
        ("Full", 1, "AdamW", True, 1.0),
    ],
)
def test_memory_is_saved_where_there_is_a_gpu(
    method: str, gpus: int, optimizer: str, checkpointing: bool, norm: float
) -> None:
    """Paged optimizer states and recomputed activations pay on a GPU only."""
    resolved = resolve_hyperparameters(spec(method=METHODS[method], resources={"gpus": gpus}))
    assert (resolved.optimizer, resolved.gradient_checkpointing, resolved.max_grad_norm) == (
        optimizer,
        checkpointing,
        norm,
    )


@pytest.mark.parametrize(
    ("given", "epochs", "max_steps"),
    [(None, 1.0, None), ({"epochs": 3}, 3.0, None), ({"maxSteps": 7}, None, 7)],
)
def test_exactly_one_of_epochs_and_steps_is_resolved(
    given: dict[str, Any] | None, epochs: float | None, max_steps: int | None
) -> None:
    """One epoch, unless the spec says how long to train."""
    resolved = resolve_hyperparameters(spec(hyperparameters=given))
    assert (resolved.epochs, resolved.max_steps) == (epochs, max_steps)


@pytest.mark.parametrize(("scheduler", "ratio"), [("Cosine", 0.06), ("Linear", 0.06), ("Constant", 0.0)])
def test_a_constant_rate_has_no_warm_up(scheduler: str, ratio: float) -> None:
    """Constant means constant from the first step on."""
    resolved = resolve_hyperparameters(spec(hyperparameters={"scheduler": scheduler}))
    assert resolved.warmup_ratio == ratio


def test_whatever_is_given_wins() -> None:
    """Every field of the spec reaches the resolved arguments unchanged, falsy values too."""
    given = {
        "epochs": 2.5,
        "learningRate": 1e-3,
        "scheduler": "Linear",
        "warmupRatio": 0.0,
        "batchSize": 2,
        "gradientAccumulationSteps": 3,
        "maxSequenceLength": 64,
        "packing": True,
        "optimizer": "Adafactor",
        "weightDecay": 0.1,
        "maxGradNorm": 0.5,
        "gradientCheckpointing": False,
        "seed": 0,
    }
    assert resolve_hyperparameters(spec(hyperparameters=given)).document() == given


def test_alpha_is_twice_the_rank() -> None:
    """The scale of the update stays 2 whatever the rank."""
    resolved = resolve_lora(spec(method={"type": "LoRA", "lora": {"rank": 4}}))
    assert resolved is not None
    assert (resolved.rank, resolved.alpha, resolved.targets) == (4, 8, "AllLinear")


def test_named_modules_take_the_place_of_the_preset() -> None:
    """targets is None where targetModules says which layers."""
    resolved = resolve_lora(spec(method={"type": "LoRA", "lora": {"targetModules": ["q_proj"]}}))
    assert resolved is not None
    assert (resolved.targets, resolved.target_modules) == (None, ["q_proj"])


def test_full_fine_tuning_has_no_adapter() -> None:
    """There is nothing to resolve."""
    assert resolve_lora(spec(method=METHODS["Full"])) is None


@pytest.mark.parametrize(
    ("dataset", "evaluation", "strategy", "steps"),
    [
        ({}, None, "None", None),
        ({"validationFraction": 0.1}, None, "Epoch", None),
        ({"validation": [{"uri": "s3://bucket/v.jsonl"}]}, {}, "Epoch", None),
        ({"validationFraction": 0.1}, {"strategy": "None"}, "None", None),
        ({"validationFraction": 0.1}, {"strategy": "Steps", "steps": 5}, "Steps", 5),
    ],
)
def test_there_is_an_evaluation_where_there_are_rows_for_it(
    dataset: dict[str, Any], evaluation: dict[str, Any] | None, strategy: str, steps: int | None
) -> None:
    """Per epoch by default, never without rows, and as the spec says."""
    rows = {"train": [{"uri": "s3://bucket/train.jsonl"}], **dataset}
    resolved = resolve_evaluation(spec(dataset=rows, evaluation=evaluation))
    assert (resolved.strategy, resolved.steps) == (strategy, steps)


@pytest.mark.parametrize(
    ("given", "load_best", "metric"),
    [
        ({}, None, None),
        ({"loadBest": False}, None, None),
        ({"loadBest": True}, True, "Loss"),
        ({"earlyStopping": {}}, True, "Loss"),
        ({"earlyStopping": {}, "loadBest": False}, None, "Loss"),
        ({"loadBest": True, "metric": "Loss"}, True, "Loss"),
    ],
)
def test_an_early_stop_keeps_the_best_model(given: dict[str, Any], load_best: bool | None, metric: str | None) -> None:
    """Unless the spec wants the last one; what nobody asked for is not in the document."""
    rows = {"train": [{"uri": "s3://bucket/train.jsonl"}], "validationFraction": 0.1}
    resolved = resolve_evaluation(spec(dataset=rows, evaluation=given))
    assert (resolved.load_best, resolved.metric, resolved.selects) == (load_best, metric, metric is not None)
