"""Rules of models that are spread over processes."""

from __future__ import annotations

from typing import Any

from tests.rule_cases.case import Case, Document, continued, dpo, grpo

PROCESSES = "resources.parallelism FSDP spreads a model over several processes"
METHOD = "resources.parallelism FSDP is for methods"
BITS = "resources.parallelism FSDP spreads quantized weights of 4 bits"
OBJECTIVE = "resources.parallelism FSDP is for objectives"
FROZEN = "resources.parallelism FSDP keeps all weights of the base frozen"
DTYPE = "resources.parallelism FSDP does not go with model.dtype Float16"
OPTIMIZER = "resources.parallelism FSDP trains all weights with hyperparameters.optimizer"


def spread(parallelism: str = "FSDP", **changes: Any) -> Document:
    """Return a run on two GPUs."""
    return {"resources": {"gpus": 2, "parallelism": parallelism}, **changes}


def lora(**settings: Any) -> Document:
    """Return the method LoRA."""
    return {"type": "LoRA", "lora": settings}


SHARDING_RULES = (
    Case("FSDP over two GPUs", True, spread(), PROCESSES),
    Case("FSDP over two CPUs", True, {"resources": {"gpus": 0, "nodes": 2, "parallelism": "FSDP"}}, PROCESSES),
    Case("FSDP on the one GPU of the default", False, {"resources": {"parallelism": "FSDP"}}, PROCESSES),
    Case("FSDP on one CPU", False, {"resources": {"gpus": 0, "nodes": 1, "parallelism": "FSDP"}}, PROCESSES),
    Case("a choice on one GPU", True, {"resources": {"gpus": 1, "parallelism": "Auto"}}, PROCESSES),
    *(
        Case(f"FSDP of {kind}", kind in ("Full", "IA3"), spread(method={"type": kind}), METHOD)
        for kind in ("Full", "IA3", "PrefixTuning", "PromptTuning")
    ),
    Case("FSDP of QLoRA", True, spread(method={"type": "QLoRA", "quantization": {}}), METHOD),
    Case("FSDP of 4 bits", True, spread(method={"type": "QLoRA", "quantization": {"bits": 4}}), BITS),
    Case("FSDP of 8 bits", False, spread(method={"type": "QLoRA", "quantization": {"bits": 8}}), BITS),
    Case("a choice for 8 bits", True, spread("Auto", method={"type": "QLoRA", "quantization": {"bits": 8}}), BITS),
    Case("DDP of QLoRA", True, spread("DDP", method={"type": "QLoRA", "quantization": {}}), METHOD),
    Case("a choice for QLoRA", True, spread("Auto", method={"type": "QLoRA", "quantization": {}}), METHOD),
    Case("FSDP for DPO", True, spread(**dpo()), OBJECTIVE),
    Case("FSDP for a classifier", True, spread(objective={"type": "Classification"}), OBJECTIVE),
    Case("FSDP for GRPO", False, spread(**grpo()), OBJECTIVE),
    Case("a choice for GRPO", True, spread("Auto", **grpo()), OBJECTIVE),
    Case("FSDP of a rank", True, spread(method=lora(rank=8, bias="None")), FROZEN),
    Case("FSDP of bias terms", False, spread(method=lora(bias="All")), FROZEN),
    Case("FSDP of saved modules", False, spread(method=lora(modulesToSave=["lm_head"])), FROZEN),
    Case("a choice for saved modules", True, spread("Auto", method=lora(modulesToSave=["lm_head"])), FROZEN),
    Case("FSDP in BFloat16", True, spread(model={"uri": "hf://a/b", "dtype": "BFloat16"}), DTYPE),
    Case("FSDP in Float16", False, spread(model={"uri": "hf://a/b", "dtype": "Float16"}), DTYPE),
    Case("FSDP going on", True, spread(**continued()), DTYPE),
    *(
        Case(
            f"FSDP of {method} with {optimizer}",
            good,
            spread(method={"type": method}, hyperparameters={"optimizer": optimizer}),
            OPTIMIZER,
        )
        for method, optimizer, good in (
            ("Full", "AdamW", True),
            ("Full", "SGD", True),
            ("Full", "AdamW8bit", False),
            ("Full", "Adafactor", False),
            ("LoRA", "AdamW8bit", True),
        )
    ),
    Case("FSDP of Full with its default optimizer", True, spread(method={"type": "Full"}), OPTIMIZER),
)
