"""hyperparameters.extra: names and types of TrainingArguments, known without transformers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.unit.api.builders import job_document
from tunewright_api import extra
from tunewright_api.defaults import resolve_hyperparameters
from tunewright_api.run_config import StorageSettings, build_train_run, run_key
from tunewright_api.training_arguments import TYPES
from tunewright_api.validation import InvalidDocument, parse_finetunejob

GOOD: dict[str, Any] = {
    "adam_beta2": 0.95,
    "adam_beta1": 1,
    "dataloader_num_workers": 2,
    "torch_compile": False,
    "train_sampling_strategy": "group_by_length",
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "per_device_eval_batch_size": 8,
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"adam_beta_2": 0.9}, "adam_beta_2 is not a scalar TrainingArguments field: did you mean adam_beta2?"),
    "unknown": ({"flux_capacitor": 1}, "flux_capacitor is not a scalar TrainingArguments field"),
    "text for a number": ({"adam_beta2": "0.9"}, "adam_beta2 is '0.9', but takes a number"),
    "fraction for a whole number": ({"ddp_timeout": 1.5}, "ddp_timeout is 1.5, but takes a whole number"),
    "true for a number": ({"ddp_timeout": True}, "ddp_timeout is True, but takes a whole number"),
    "number for true": ({"dataloader_drop_last": 1}, "dataloader_drop_last is 1, but takes true or false"),
    "compilation": (
        {"torch_compile": True},
        "torch_compile wants torch.compile, which needs a C compiler that the trainer's image does not have: leave it",
    ),
    "compilation by its mode": ({"torch_compile_mode": "reduce-overhead"}, "torch_compile_mode wants torch.compile"),
    "compilation by its backend": ({"torch_compile_backend": "eager"}, "torch_compile_backend wants torch.compile"),
    "no JSON": ({"lr_scheduler_kwargs": "cycles=2"}, "lr_scheduler_kwargs is 'cycles=2', but takes JSON text"),
    "no choice": ({"log_level": "loud"}, "log_level is 'loud', but takes one of detail, debug"),
    "own field": ({"learning_rate": 0.1}, "learning_rate is set by hyperparameters.learningRate: use that field"),
    "own matter": ({"save_steps": 5}, "save_steps is set by tunewright itself: leave it out"),
    "two at once": ({"fsdp": "x", "optim": "sgd"}, "fsdp is set by tunewright itself: leave it out; optim is set by"),
    "a map": ({"adam_beta2": {"a": 1}}, "adam_beta2"),
}


def document(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a FineTuneJob with further arguments."""
    return job_document(hyperparameters={"extra": arguments})


def test_good_arguments_are_part_of_the_run() -> None:
    """They reach the run document as they are, and other values are another run."""
    given = parse_finetunejob(document(GOOD)).spec
    assert resolve_hyperparameters(given).extra == GOOD
    keys = {
        run_key(
            build_train_run(
                parse_finetunejob(document(arguments)).spec,
                name="a", namespace="b", attempt=1, storage=StorageSettings(),
            ),
            model_version="1", data_versions={},
        )
        for arguments in (GOOD, {**GOOD, "adam_beta2": 0.9})
    }  # fmt: skip
    assert len(keys) == 2


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    """The message has the name, the value and the remedy; nothing is created for such a spec."""
    arguments, message = BAD[case]
    with pytest.raises(InvalidDocument, match=re.escape(message)) as caught:
        parse_finetunejob(document(arguments))
    assert caught.value.problems[0].path.startswith("spec.hyperparameters.extra")


def test_reserved_names_are_names() -> None:
    """No entry of the lists is a name that transformers has dropped."""
    assert set(extra.OWN) <= set(TYPES)
    assert not {name for name in extra.allowed() if name.startswith(("save_", "hub_", "logging_", "push_", "fsdp"))}


def test_ppo_takes_none() -> None:
    """Its loop is no transformers Trainer, so arguments of one would be without effect."""
    given = document(GOOD)
    given["spec"]["objective"] = {"type": "PPO", "ppo": {"rewards": [{"type": "JSON"}]}}
    with pytest.raises(InvalidDocument, match=r"hyperparameters\.extra is not for objective PPO"):
        parse_finetunejob(given)
