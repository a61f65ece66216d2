"""Axolotl's block `trl` for GRPO."""

from __future__ import annotations

from typing import Any

from tunewright_cli.axolotl.draft import Draft, Keys, Kind
from tunewright_cli.axolotl.keys import Unmapped, report_left
from tunewright_cli.axolotl.sources import PLACEHOLDER, bucket_key

_WITHOUT = "remove the key to convert without it"
_ENGINE = "the trainer samples the answers itself"
_LOSSES = {"grpo": "GRPO", "dapo": "DAPO", "dr_grpo": "DrGRPO", "bnpo": "BNPO"}
TRL_KEYS = (
    "reward_funcs", "reward_weights", "num_generations", "max_completion_length", "temperature", "top_p", "epsilon",
    "beta", "loss_type", "scale_rewards",
)  # fmt: skip
"""Keys that are converted."""
_OFF = {"sync_ref_model": False, "num_iterations": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
"""Keys that have no field, and the value with which they do nothing."""

TRL = Unmapped(
    not_needed={
        "use_vllm": _ENGINE,
        "vllm_*": _ENGINE,
        "ref_model_*": "the reference stays as it is",
        "use_liger_loss": "kernels change the speed, not the result; the fastest that is installed is taken",
    },
    not_converted={
        "log_completions": "samples are written at the end of the run alone",
        "num_completions_to_print": "samples are written at the end of the run alone",
    },
    refused={
        "sync_ref_model": f"the reference is the model at the start; {_WITHOUT}",
        "num_iterations": f"answers are learned from once; {_WITHOUT}",
        "top_k": f"answers are sampled by temperature and top_p; {_WITHOUT}",
        "min_p": f"answers are sampled by temperature and top_p; {_WITHOUT}",
        "repetition_penalty": f"answers are sampled by temperature and top_p; {_WITHOUT}",
        "epsilon_high": f"the likelihood is clipped by epsilon on both sides; {_WITHOUT}",
        "mask_truncated_completions": f"answers that were cut count as well; {_WITHOUT}",
        "reward_processing_classes": f"reward models have tokenizers of their own; {_WITHOUT}",
        "rollout_func": f"the trainer samples the answers itself; {_WITHOUT}",
    },
)


def convert_grpo(draft: Draft, trl: Keys) -> None:
    """Set objective.grpo.

    Args:
        draft: The draft.
        trl: The keys of the block `trl`.
    """
    _rewards(draft, trl)
    length = trl.take_whole("max_completion_length")
    if length is None:
        trl.note(Kind.DIFFERS, "max_completion_length", "not set: answers are cut at 256 tokens, in Axolotl nowhere")
    draft.set("objective.grpo.maxCompletionLength", length, "trl.max_completion_length")
    draft.set("objective.grpo.generations", trl.take_whole("num_generations"), "trl.num_generations")
    for key, field in (("temperature", "temperature"), ("top_p", "topP"), ("epsilon", "epsilon")):
        draft.set(f"objective.grpo.{field}", trl.take_number(key), f"trl.{key}")
    _loss(draft, trl)
    for key, value in _OFF.items():
        if trl.left().get(key) == value:
            trl.take(key)
            trl.note(Kind.NOT_NEEDED, key, "off, as here")
    report_left(trl, TRL, frozenset(TRL_KEYS))


def _rewards(draft: Draft, trl: Keys) -> None:
    """Put a reward in place of each function of the user's own, which is not run here."""
    functions, weights = trl.take_texts("reward_funcs"), trl.take("reward_weights")
    if not functions:
        trl.note(Kind.ERROR, "reward_funcs", "missing: name what answers are rewarded for")
        return
    if weights is None:
        weights = [1.0] * len(functions)
    if not isinstance(weights, list) or len(weights) != len(functions):
        trl.note(Kind.ERROR, "reward_weights", f"must be a list of {len(functions)} numbers, one per reward function")
        return
    rewards: list[dict[str, Any]] = []
    for name, weight in zip(functions, weights, strict=True):
        uri = f"{PLACEHOLDER}/rewards/{bucket_key(name)}"
        rewards.append({"type": "Model", "weight": weight, "model": {"uri": uri}})
        text = f"{name} is code or a model of your own: in place of {uri} write the address of a reward model of "
        text += "tunewright, or another reward of objective.grpo (ExactMatch, Regex, JSON, Length)"
        trl.note(Kind.TO_DO, "reward_funcs", text)
    draft.set("objective.grpo.rewards", rewards, "trl.reward_funcs")


def _loss(draft: Draft, trl: Keys) -> None:
    name, scaled = trl.take_text("loss_type"), trl.take("scale_rewards")
    loss = _LOSSES.get(name or "dapo")
    if loss is None:
        trl.note(Kind.ERROR, "loss_type", f"{name!r} is not known here: use one of {', '.join(_LOSSES)}")
        return
    draft.set("objective.grpo.loss", loss if name else None, "trl.loss_type")
    unscaled = scaled in (False, "none")
    if unscaled and loss != "DrGRPO":
        text = "rewards are divided by their deviation within the group, except with loss_type: dr_grpo"
        trl.note(Kind.ERROR, "scale_rewards", text)
    elif loss == "DrGRPO" and not unscaled:
        text = "rewards are not divided by their deviation with dr_grpo; Axolotl does so unless scale_rewards is false"
        trl.note(Kind.DIFFERS, "scale_rewards", text)
    elif scaled not in (None, True, "group", False, "none"):
        text = f"rewards are divided by their group's deviation, not by that of {scaled!r}"
        trl.note(Kind.ERROR, "scale_rewards", text)
