"""What is learned and which weights are trained: objective and method."""

from __future__ import annotations

import re
from typing import Any

from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_cli.axolotl.draft import Draft, Kind
from tunewright_cli.axolotl.reinforcement import convert_grpo

_DTYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32"}
_OBJECTIVES: dict[Any, ObjectiveType] = {None: "SFT", "dpo": "DPO", "ipo": "DPO", "kto": "KTO", True: "DPO"}
_OBJECTIVES["grpo"] = "GRPO"
_BLOCKS = {"DPO": "dpo", "KTO": "kto", "GRPO": "grpo"}
_DPO_LOSSES = {
    "sigmoid": "Sigmoid",
    "hinge": "Hinge",
    "ipo": "IPO",
    "exo_pair": "EXOPair",
    "nca_pair": "NCAPair",
    "robust": "Robust",
    "bco_pair": "BCOPair",
    "sppo_hard": "SPPOHard",
    "aot": "AOT",
    "aot_unpaired": "AOTUnpaired",
    "apo_zero": "APOZero",
    "apo_down": "APODown",
    "discopop": "DiscoPOP",
}
_HEADS = {"lm_head", "embed_tokens", "embed_out", "wte"}
"""Layers that lora_target_linear leaves out."""


def convert_objective(draft: Draft) -> ObjectiveType:
    """Set the objective and return its type; SFT after an error."""
    kind, reward = draft.take("rl"), draft.take_flag("reward_model")
    kind = None if kind is False else kind
    if not isinstance(kind, str | bool | None) or kind not in _OBJECTIVES:
        text = f"{kind!r} cannot be converted: dpo, ipo, kto, grpo and reward_model can; write the FineTuneJob by hand"
        draft.note(Kind.ERROR, "rl", text)
        return "SFT"
    objective: ObjectiveType = "Reward" if reward else _OBJECTIVES[kind]
    labels = draft.take_whole("num_labels")
    if objective == "Reward" and labels in (None, 1):
        labels = None
    if labels is not None:
        text = f"{labels} outputs are those of a classifier, which Axolotl has no data sets for; remove the key"
        draft.note(Kind.ERROR, "num_labels", text)
    if objective != "SFT":
        draft.set("objective.type", objective, "rl" if kind else "reward_model")
    _sft_loss(draft, objective)
    _preference_settings(draft, objective, kind)
    center = draft.take_number("center_rewards_coefficient")
    _set_only(draft, objective == "Reward", "objective.reward.centerRewards", center, "center_rewards_coefficient")
    return objective


def _sft_loss(draft: Draft, objective: ObjectiveType) -> None:
    learns_all = draft.take_flag("train_on_inputs")
    _set_only(draft, objective == "SFT", "objective.sft.loss", "AllTokens" if learns_all else None, "train_on_inputs")
    if learns_all and objective == "SFT":
        draft.set("objective.type", "SFT", "train_on_inputs")


def _preference_settings(draft: Draft, objective: ObjectiveType, kind: Any) -> None:
    block = _BLOCKS.get(objective, "")
    beta = draft.take_number("rl_beta")
    for_dpo = draft.take_number("dpo_beta")
    trl = draft.inside("trl", draft.take_mapping("trl"))
    in_trl = trl.take_number("beta")
    beta = beta if in_trl is None else in_trl  # Axolotl looks there first
    if objective == "GRPO":
        convert_grpo(draft, trl)
    for key in trl.left() if objective != "GRPO" else ():
        trl.note(Kind.NOT_NEEDED, key, "only for rl: grpo")
    beta = for_dpo if for_dpo is not None and objective != "GRPO" else beta
    _set_only(draft, bool(block), f"objective.{block}.beta", beta, "rl_beta")
    limit = draft.take_whole("max_prompt_len")
    _set_only(draft, bool(block), f"objective.{block}.maxPromptLength", limit, "max_prompt_len")
    _dpo_loss(draft, objective, kind)
    for key, field in (("kto_desirable_weight", "desirableWeight"), ("kto_undesirable_weight", "undesirableWeight")):
        _set_only(draft, objective == "KTO", f"objective.kto.{field}", draft.take_number(key), key)


def _dpo_loss(draft: Draft, objective: ObjectiveType, kind: Any) -> None:
    names = draft.take_texts("dpo_loss_type")
    if kind == "ipo":
        draft.set("objective.dpo.loss", "IPO", "rl")
    elif len(names) > 1:
        draft.note(Kind.ERROR, "dpo_loss_type", f"one loss is learned, not the sum of {', '.join(names)}: keep one")
    elif names and names[0] not in _DPO_LOSSES:
        text = f"{names[0]!r} is not known here: use one of {', '.join(_DPO_LOSSES)}"
        draft.note(Kind.ERROR, "dpo_loss_type", text)
    elif names:
        _set_only(draft, objective == "DPO", "objective.dpo.loss", _DPO_LOSSES[names[0]], "dpo_loss_type")
    smoothing = draft.take_number("dpo_label_smoothing")
    # Axolotl ignores it for IPO, whose loss has no labels to smooth.
    applies = objective == "DPO" and kind != "ipo"
    _set_only(draft, applies, "objective.dpo.labelSmoothing", smoothing, "dpo_label_smoothing")


def _set_only(draft: Draft, applies: bool, field: str, value: Any, key: str) -> None:
    """Set a field where it applies; Axolotl, too, ignores such a key elsewhere."""
    if applies:
        draft.set(field, value, key)
    elif value is not None:
        draft.note(Kind.NOT_NEEDED, key, "only for another objective")


def convert_method(draft: Draft) -> None:
    """Set the method with its adapter and quantization."""
    adapter, four, eight = draft.take_text("adapter"), draft.take_flag("load_in_4bit"), draft.take_flag("load_in_8bit")
    if adapter not in (None, "lora", "qlora"):
        text = f"{adapter!r} cannot be converted: lora and qlora can, and no adapter for full fine-tuning"
        draft.note(Kind.ERROR, "adapter", text)
    elif adapter == "qlora" and not four:
        draft.note(Kind.ERROR, "adapter", "qlora needs load_in_4bit: true, in Axolotl as well")
    elif adapter is None and (four or eight):
        key = "load_in_4bit" if four else "load_in_8bit"
        draft.note(Kind.ERROR, key, "full fine-tuning needs the whole weights: remove the key, or set adapter: lora")
    if four or eight:
        draft.set("method.type", "QLoRA", "adapter")
        draft.set("method.quantization.bits", 4 if four else 8, "load_in_4bit" if four else "load_in_8bit")
    else:
        draft.set("method.type", "LoRA" if adapter else "Full", "adapter")
    _quantization(draft, four=bool(four))
    _lora(draft, applies=adapter is not None)


def _quantization(draft: Draft, *, four: bool) -> None:
    keys = draft.inside("bnb_config_kwargs", draft.take_mapping("bnb_config_kwargs"))
    if four:
        kind, double = keys.take_text("bnb_4bit_quant_type"), keys.take_flag("bnb_4bit_use_double_quant")
        draft.set("method.quantization.type", kind.upper() if kind else None, "bnb_config_kwargs")
        draft.set("method.quantization.doubleQuant", double, "bnb_config_kwargs")
        compute = (keys.take_text("bnb_4bit_compute_dtype") or "").removeprefix("torch.")
        draft.set("method.quantization.computeDtype", _DTYPES.get(compute, compute or None), "bnb_config_kwargs")
    for key, value in keys.left().items():
        if value is False or key == "bnb_4bit_quant_storage" or key.startswith("bnb_4bit_"):
            keys.note(Kind.NOT_NEEDED, key, "no influence on the result")
        else:
            keys.note(Kind.ERROR, key, "cannot be set; remove the key to convert without it")


def _lora(draft: Draft, *, applies: bool) -> None:
    values = {
        "rank": ("lora_r", draft.take_whole("lora_r")),
        "alpha": ("lora_alpha", draft.take_whole("lora_alpha")),
        "dropout": ("lora_dropout", draft.take_number("lora_dropout")),
        "modulesToSave": ("lora_modules_to_save", draft.take_texts("lora_modules_to_save") or None),
        "useRslora": ("peft_use_rslora", draft.take_flag("peft_use_rslora")),
        "useDora": ("peft_use_dora", draft.take_flag("peft_use_dora")),
    }
    linear, modules = draft.take_flag("lora_target_linear"), draft.take_texts("lora_target_modules")
    if not applies:
        values["targets"] = ("lora_target_linear", linear)
        values["targetModules"] = ("lora_target_modules", modules or None)
    for field, (key, value) in values.items():
        if applies:
            draft.set(f"method.lora.{field}", value, key)
        elif value is not None:
            draft.note(Kind.NOT_NEEDED, key, "there is no adapter")
    if applies:
        if values["dropout"][1] is None:
            draft.set("method.lora.dropout", 0.0)
        _targets(draft, bool(linear), modules)


def _targets(draft: Draft, linear: bool, names: list[str]) -> None:
    patterns = [name for name in names if re.search(r"[^A-Za-z0-9_.-]", name)]
    if linear or "all-linear" in names:
        heads = sorted(_HEADS.intersection(names))
        if heads:
            text = f"output head and embeddings ({', '.join(heads)}) take no adapter: name them in lora_modules_to_save"
            draft.note(Kind.ERROR, "lora_target_modules", text)
        draft.set("method.lora.targets", "AllLinear", "lora_target_linear")
    elif patterns:
        text = f"layers are chosen by name, not by the pattern {patterns[0]!r}: list their names"
        draft.note(Kind.ERROR, "lora_target_modules", text)
    elif names:
        draft.set("method.lora.targetModules", names, "lora_target_modules")
    else:
        text = "no layers are named: all linear layers are adapted"
        draft.note(Kind.DIFFERS, "adapter", text)


def convert_dtype(draft: Draft) -> None:
    """Set model.dtype; the method must be there already. Mixed precision or not is decided by the method here."""
    bf16, fp16 = draft.take("bf16"), draft.take("fp16")
    full = {name: draft.take_flag(name) for name in _DTYPES}
    if full["bfloat16"] or (bf16 and bf16 != "auto"):
        draft.set("model.dtype", "BFloat16", "bf16")
    elif full["float16"] or fp16:
        if draft.spec["method"]["type"] == "QLoRA":
            text = "adapters on a quantized model are not trained in float16: bfloat16 or float32 is taken"
            draft.note(Kind.DIFFERS, "fp16", text)
        else:
            draft.set("model.dtype", "Float16", "fp16")
    elif full["float32"] or bf16 is False:
        draft.set("model.dtype", "Float32", "bf16")
