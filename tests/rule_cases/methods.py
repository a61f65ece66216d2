"""Rules between methods, objectives and what they learn from."""

from __future__ import annotations

from tests.rule_cases.case import Case, Document, continued, dataset, dpo, grpo, kto, ppo

TARGETS = "lora.targets and lora.targetModules exclude each other"
QUANT_BITS = "quantization.type and quantization.doubleQuant are only for bits: 4"
LORA_FULL = "method.lora is only for LoRA and QLoRA"
QLORA = "method.quantization belongs to QLoRA"
METHOD_BLOCKS = {
    "prefixTuning": ("PrefixTuning", {"virtualTokens": 8}),
    "promptTuning": ("PromptTuning", {"initText": "Answer:"}),
    "ia3": ("IA3", {"targetModules": ["k_proj"]}),
}
OBJECTIVES = {
    "sft": ("SFT", "Messages"),
    "dpo": ("DPO", "Preference"),
    "kto": ("KTO", "UnpairedPreference"),
    "reward": ("Reward", "Preference"),
    "classification": ("Classification", "Labelled"),
}
IA3_FEEDFORWARD = "ia3.feedforwardModules must be among ia3.targetModules"
SMOOTHING = "dpo.labelSmoothing is only for the losses"
EXO = "dpo.loss EXOPair needs a dpo.labelSmoothing"
SMALL_ADAPTERS = "PrefixTuning, PromptTuning and IA3 are only for objective SFT"
PACKING = "hyperparameters.packing is only for objective SFT"
PREFIX_CHECKPOINTING = "hyperparameters.gradientCheckpointing does not work with PrefixTuning"
ONE_REFERENCE = "a reference names a result by exactly one of fineTuneJob and uri"
CONTINUED_METHOD = "model.continueFrom goes on from an adapter of the methods"
CONTINUED_SETTINGS = "model.continueFrom keeps the settings of the adapter"

KTO_BATCH = "kto.loss KTO compares the answers of a batch"
ONE_ROW = {"hyperparameters": {"batchSize": 1}}

MERGED_METHOD = "output.merge is only for LoRA, QLoRA and IA3"
MERGED_GGUF = "output.merge.gguf needs a model that writes text"
MERGED_TWICE = "merge.gguf names a type twice"


def merged(method: str = "LoRA", objective: str = "SFT", **settings: object) -> Document:
    """Return a run that publishes the merged weights as well."""
    block = {"quantization": {"bits": 4}} if method == "QLoRA" else {}
    output = {"uri": "s3://models/case", "merge": settings}
    return {"method": {"type": method, **block}, "objective": {"type": objective}, "output": output}


METHOD_RULES = (
    *(Case(f"merge after {m}", True, merged(m, dtype="BFloat16"), MERGED_METHOD) for m in ("LoRA", "QLoRA", "IA3")),
    *(Case(f"merge after {m}", False, merged(m), MERGED_METHOD) for m in ("Full", "PrefixTuning", "PromptTuning")),
    Case("merge to GGUF", True, merged(gguf=["Q8_0", "Q4_K_M"], maxShardSize="500MB"), MERGED_GGUF),
    Case("merge of a classifier", True, merged(objective="Classification"), MERGED_GGUF),
    Case("classifier to GGUF", False, merged(objective="Classification", gguf=["Q8_0"]), MERGED_GGUF),
    Case("reward model to GGUF", False, merged(objective="Reward", gguf=["Q8_0"]), MERGED_GGUF),
    Case("merge to two GGUF types", True, merged(gguf=["F16", "Q8_0"]), MERGED_TWICE),
    Case("merge to a GGUF type twice", False, merged(gguf=["Q8_0", "Q8_0"]), MERGED_TWICE),
    Case("KTO with its default batch", True, {"objective": {"type": "KTO"}}, KTO_BATCH),
    Case("KTO with two answers at a time", True, {**kto(), "hyperparameters": {"batchSize": 2}}, KTO_BATCH),
    Case("KTO with one answer at a time", False, {"objective": {"type": "KTO"}, **ONE_ROW}, KTO_BATCH),
    Case("KTO by name with one answer", False, {**kto(loss="KTO"), **ONE_ROW}, KTO_BATCH),
    Case("APO zero with one answer", True, {**kto(loss="APOZeroUnpaired"), **ONE_ROW}, KTO_BATCH),
    Case("DPO with one pair", True, {"objective": {"type": "DPO"}, **ONE_ROW}, KTO_BATCH),
    *(
        Case(f"{name} with its method", True, {"method": {"type": kind, name: block}}, f"method.{name} is only for")
        for name, (kind, block) in METHOD_BLOCKS.items()
    ),
    *(
        Case(f"{name} with LoRA", False, {"method": {"type": "LoRA", name: block}}, f"method.{name} is only for")
        for name, (_, block) in METHOD_BLOCKS.items()
    ),
    Case(
        "ia3 modules",
        True,
        {"method": {"type": "IA3", "ia3": {"targetModules": ["k", "down"], "feedforwardModules": ["down"]}}},
        IA3_FEEDFORWARD,
    ),
    Case(
        "ia3 feedforward alone",
        False,
        {"method": {"type": "IA3", "ia3": {"feedforwardModules": ["down"]}}},
        IA3_FEEDFORWARD,
    ),
    Case(
        "ia3 feedforward elsewhere",
        False,
        {"method": {"type": "IA3", "ia3": {"targetModules": ["k"], "feedforwardModules": ["down"]}}},
        IA3_FEEDFORWARD,
    ),
    *(
        Case(f"objective {kind}", True, {"objective": {"type": kind, name: {}}}, f"objective.{name} is only for")
        for name, (kind, _) in OBJECTIVES.items()
    ),
    *(
        Case(
            f"{name} block of another objective",
            False,
            {"objective": {"type": "KTO" if kind != "KTO" else "DPO", name: {}}},
            f"objective.{name} is only for",
        )
        for name, (kind, _) in OBJECTIVES.items()
    ),
    Case("dpo block without type", False, {"objective": {"dpo": {}}}, "objective.dpo is only for"),
    *(
        Case(
            f"{kind} with rows of format {data_format}",
            True,
            {**dataset(format=data_format), "objective": {"type": kind}},
            f"objective {kind} learns from rows of format",
        )
        for kind, data_format in OBJECTIVES.values()
    ),
    *(
        Case(
            f"{kind} with rows of another format",
            False,
            {**dataset(format="Labelled" if kind != "Classification" else "Text"), "objective": {"type": kind}},
            f"objective {kind} learns from rows of format",
        )
        for kind, _ in OBJECTIVES.values()
    ),
    Case("smoothed sigmoid", True, dpo(labelSmoothing=0.1), SMOOTHING),
    Case("smoothed hinge", False, dpo(labelSmoothing=0.1, loss="Hinge"), SMOOTHING),
    Case("exo with smoothing", True, dpo(labelSmoothing=0.001, loss="EXOPair"), EXO),
    Case("exo without smoothing", False, dpo(loss="EXOPair"), EXO),
    *(
        Case(
            f"bias for {kind}",
            good,
            {"objective": {"type": kind, **block}, "method": {"type": "LoRA", "lora": {"bias": "All"}}},
            "lora.bias is not for DPO, KTO, GRPO, PPO",
        )
        for kind, good, block in (
            ("SFT", True, {}),
            ("Reward", True, {}),
            ("DPO", False, {}),
            ("KTO", False, {}),
            ("GRPO", False, grpo()["objective"]),
        )
    ),
    Case("IA3 for SFT", True, {"method": {"type": "IA3"}}, SMALL_ADAPTERS),
    Case("IA3 for DPO", False, {"method": {"type": "IA3"}, "objective": {"type": "DPO"}}, SMALL_ADAPTERS),
    Case("packing", True, {"hyperparameters": {"packing": True}}, PACKING),
    Case("no packing for DPO", True, {"hyperparameters": {"packing": False}, "objective": {"type": "DPO"}}, PACKING),
    Case("packing for DPO", False, {"hyperparameters": {"packing": True}, "objective": {"type": "DPO"}}, PACKING),
    Case(
        "packing for prompt tuning",
        False,
        {"hyperparameters": {"packing": True}, "method": {"type": "PromptTuning"}},
        PACKING,
    ),
    Case("checkpointing", True, {"hyperparameters": {"gradientCheckpointing": True}}, PREFIX_CHECKPOINTING),
    Case(
        "checkpointing for prefix tuning",
        False,
        {"hyperparameters": {"gradientCheckpointing": True}, "method": {"type": "PrefixTuning"}},
        PREFIX_CHECKPOINTING,
    ),
    Case("target preset", True, {"method": {"type": "LoRA", "lora": {"targets": "Attention"}}}, TARGETS),
    Case("target modules", True, {"method": {"type": "LoRA", "lora": {"targetModules": ["q_proj"]}}}, TARGETS),
    Case(
        "both targets",
        False,
        {"method": {"type": "LoRA", "lora": {"targets": "Attention", "targetModules": ["q_proj"]}}},
        TARGETS,
    ),
    Case("4 bits with type", True, {"method": {"type": "QLoRA", "quantization": {"type": "NF4"}}}, QUANT_BITS),
    Case("8 bits", True, {"method": {"type": "QLoRA", "quantization": {"bits": 8}}}, QUANT_BITS),
    Case(
        "8 bits with type",
        False,
        {"method": {"type": "QLoRA", "quantization": {"bits": 8, "type": "NF4"}}},
        QUANT_BITS,
    ),
    Case(
        "8 bits with double quantization",
        False,
        {"method": {"type": "QLoRA", "quantization": {"bits": 8, "doubleQuant": True}}},
        QUANT_BITS,
    ),
    Case("full", True, {"method": {"type": "Full"}}, LORA_FULL),
    Case("full with adapter", False, {"method": {"type": "Full", "lora": {"rank": 8}}}, LORA_FULL),
    Case("QLoRA", True, {"method": {"type": "QLoRA", "quantization": {}, "lora": {"rank": 8}}}, QLORA),
    Case("QLoRA without quantization", False, {"method": {"type": "QLoRA"}}, QLORA),
    Case("LoRA with quantization", False, {"method": {"type": "LoRA", "quantization": {}}}, QLORA),
    Case("full with quantization", False, {"method": {"type": "Full", "quantization": {}}}, QLORA),
)

CONTINUE_RULES = (
    Case("reference by name", True, continued(fineTuneJob="other"), ONE_REFERENCE),
    Case("reference by URI", True, continued(uri="s3://models/other/0123456789abcdef"), ONE_REFERENCE),
    Case("reward model by name", True, grpo({"type": "Model", "model": {"fineTuneJob": "judge"}}), ONE_REFERENCE),
    Case("reward model by nothing", False, grpo({"type": "Model", "model": {}}), ONE_REFERENCE),
    Case("empty reference", False, {"model": {"uri": "hf://a/b", "continueFrom": {}}}, ONE_REFERENCE),
    Case("reference by both", False, continued(fineTuneJob="other", uri="s3://models/other"), ONE_REFERENCE),
    *(
        Case(f"going on with {method['type']}", True, continued(method), CONTINUED_METHOD)
        for method in ({"type": "LoRA"}, {"type": "QLoRA", "quantization": {}}, {"type": "IA3"})
    ),
    *(
        Case(f"going on with {kind}", False, continued({"type": kind}), CONTINUED_METHOD)
        for kind in ("Full", "PrefixTuning", "PromptTuning")
    ),
    Case(
        "quantization for another adapter", True, continued({"type": "QLoRA", "quantization": {}}), CONTINUED_SETTINGS
    ),
    *(
        Case(f"going on with settings of {kind}", False, continued({"type": kind, name: {}}), CONTINUED_SETTINGS)
        for kind, name in (("LoRA", "lora"), ("IA3", "ia3"))
    ),
    *(
        Case(f"going on with {kind}", True, continued(objective=kind), CONTINUED_SETTINGS)
        for kind in ("DPO", "KTO", "Reward", "Classification")
    ),
    *(
        Case(f"going on with {kind}", True, {**continued(), **rewarded}, CONTINUED_SETTINGS)
        for kind, rewarded in (("GRPO", grpo()), ("PPO", ppo()))
    ),
)
