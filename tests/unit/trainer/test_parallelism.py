"""Whether processes hold a whole model each, or a share of it each: the choice, and the memory it goes by."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer.kit import make_run
from tunewright_api.run_config import TrainRun, run_key
from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.parallelism import Parallelism, choose_parallelism, training_bytes

BILLION = 10**9
SPEC: dict[str, Any] = {
    "model": {"uri": "hf://org/model"},
    "dataset": {"train": [{"uri": "s3://datasets/train.jsonl"}]},
    "output": {"uri": "s3://models/out"},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "PrefixTuning": {"method": {"type": "PrefixTuning"}},
    "PromptTuning": {"method": {"type": "PromptTuning"}},
    "bits 8": {"method": {"type": "QLoRA", "quantization": {"bits": 8}}},
    "GRPO": {"objective": {"type": "GRPO", "grpo": {"rewards": [{"type": "JSON"}]}}},
    "Float16": {"model": {"uri": "hf://org/model", "dtype": "Float16"}},
    "modulesToSave": {"method": {"type": "LoRA", "lora": {"modulesToSave": ["lm_head"]}}},
    "bias All": {"method": {"type": "LoRA", "lora": {"bias": "All"}}},
    "Adafactor": {"method": {"type": "Full"}, "hyperparameters": {"optimizer": "Adafactor"}},
}


def run_of(parallelism: str = "Auto", gpus: int = 2, **spec: Any) -> TrainRun:
    """Build a run on several GPUs."""
    return make_run(None, **{**SPEC, **spec, "resources": {"gpus": gpus, "parallelism": parallelism}})


def chosen(run: TrainRun, parameters: int = 70 * BILLION, gpu_bytes: int | None = 80 * BILLION) -> Parallelism | None:
    """Choose for a model in bfloat16."""
    return choose_parallelism(run, parameters=parameters, weight_bytes=2, gpu_bytes=gpu_bytes)


@pytest.mark.parametrize(
    ("spec", "bytes_of_each"),
    [
        ({"method": {"type": "LoRA"}}, 2),
        ({"method": {"type": "Full"}}, 16),
        ({"method": {"type": "Full"}, "hyperparameters": {"optimizer": "SGD"}}, 8),
        ({"method": {"type": "Full"}, "objective": {"type": "DPO"}}, 20),
        ({"method": {"type": "LoRA"}, "objective": {"type": "DPO"}}, 2),
        ({"method": {"type": "QLoRA", "quantization": {}}}, 0.6),
        ({"method": {"type": "QLoRA", "quantization": {"bits": 8}}}, 1),
    ],
    ids=[
        "LoRA",
        "all weights with AdamW",
        "with SGD",
        "with a reference",
        "the adapter switched off as reference",
        "4 bits",
        "8 bits",
    ],
)
def test_memory_of_a_whole_model(spec: dict[str, Any], bytes_of_each: float) -> None:
    """Weights, their gradients, the optimizer's averages, and a second model as reference."""
    assert training_bytes(run_of(**spec), 7 * BILLION, 2) == 7 * BILLION * bytes_of_each


def test_auto_spreads_what_does_not_fit() -> None:
    """A model of 70 billion weights is spread over GPUs of 80 GB, and one of 30 billion is not."""
    assert str(chosen(run_of())) == (
        "FSDP: weights, gradients and optimizer states take 140.0 GB, more than 80% of the 80.0 GB of a GPU"
    )
    assert str(chosen(run_of(), 30 * BILLION)) == (
        "DDP: weights, gradients and optimizer states take 60.0 GB, no more than 80% of the 80.0 GB of a GPU"
    )


@pytest.mark.parametrize("case", BLOCKS)
def test_auto_does_not_spread_what_fsdp_does_not_train(case: str) -> None:
    """Auto is DDP where FSDP would be refused, and says what is in the way."""
    found = chosen(run_of(**BLOCKS[case]))
    assert found is not None
    assert not found.sharded
    assert case in found.reason
    assert "is not trained with FSDP" in found.reason


@pytest.mark.parametrize(
    ("adapter", "named"),
    [({"modules_to_save": ["score", "lm_head"]}, "with lm_head in it"), ({"bias": "all"}, "with bias terms in it")],
)
def test_adapters_that_changed_the_base(adapter: dict[str, Any], named: str) -> None:
    """An adapter to go on from that has weights of the base in it keeps Auto from FSDP, and is refused with FSDP."""
    of: dict[str, Any] = {"parameters": 70 * BILLION, "weight_bytes": 2, "gpu_bytes": 80 * BILLION, "adapter": adapter}
    found = choose_parallelism(run_of(), **of)
    assert found is not None
    assert not found.sharded
    assert named in found.reason
    with pytest.raises(InvalidConfiguration, match=f"{named} is not trained with it: set it to DDP or Auto"):
        choose_parallelism(run_of("FSDP"), **of)


def test_adapters_with_a_head() -> None:
    """The head of a reward model or a classifier is spread like the rest."""
    of: dict[str, Any] = {
        "parameters": 1,
        "weight_bytes": 2,
        "gpu_bytes": None,
        "adapter": {"modules_to_save": ["score"]},
    }
    found = choose_parallelism(run_of("FSDP"), **of)
    assert found is not None
    assert found.sharded


def test_auto_without_gpus() -> None:
    """On CPUs Auto is DDP."""
    run = make_run(None, **SPEC, resources={"gpus": 0, "nodes": 2, "parallelism": "Auto"})
    assert str(chosen(run, gpu_bytes=None)) == "DDP: there is no GPU that the model could be too large for"


@pytest.mark.parametrize("given", ["DDP", "FSDP"])
def test_what_is_asked_for_is_done(given: str) -> None:
    """Whatever the size of the model."""
    assert str(chosen(run_of(given), 1)) == f"{given}: resources.parallelism says so"
    assert str(chosen(run_of(given))) == f"{given}: resources.parallelism says so"


def test_one_process_has_nothing_to_choose() -> None:
    """A run in one process has no parallelism."""
    assert chosen(run_of(gpus=1)) is None


def test_results_are_found_whatever_the_parallelism() -> None:
    """DDP and FSDP train to the same result, so they share a run key."""
    keys = {run_key(run_of(kind), model_version="1", data_versions={}) for kind in ("Auto", "DDP", "FSDP")}
    assert len(keys) == 1
