"""Rules of GRPO and PPO, whose rewards are blocks of their own."""

from __future__ import annotations

from tests.rule_cases.case import Case, dataset, grpo, lengths, ppo

GRPO_BLOCK = "objective.grpo belongs to objective.type GRPO"
GRPO_FORMAT = "objective GRPO learns from rows of format"
GROUPS = "objective GRPO compares whole groups of answers"
GRPO_LENGTHS = "grpo.maxPromptLength and grpo.maxCompletionLength (default 256) must fit together"
PPO_BLOCK = "objective.ppo belongs to objective.type PPO"
PPO_FORMAT = "objective PPO learns from rows of format"
PPO_METHOD = "objective PPO is only for method.type LoRA and QLoRA"
PPO_DROPOUT = "objective PPO trains without dropout"
PPO_PROCESSES = "objective PPO trains in one process"
PPO_BIAS = "lora.bias is not for DPO, KTO, GRPO, PPO"
MINI_BATCHES = "objective PPO splits its rollouts into equal parts"
PPO_LENGTHS = "ppo.maxPromptLength and ppo.maxCompletionLength (default 256) must fit together"
PATTERN = "regex.pattern is no regular expression in RE2 syntax"
LENGTH_KIND = "length wants either a target, or minTokens, maxTokens or both"
LENGTH_ORDER = "length.minTokens may not be above length.maxTokens"
EXACT_MATCH = "rewards[].exactMatch is only for type ExactMatch"
JSON_BLOCK = "rewards[].json is only for type JSON"
WEIGHT = "rewards[].weight may not be 0"
REWARD_BLOCKS = {
    "model": ("Model", {"uri": "s3://models/judge"}),
    "regex": ("Regex", {"pattern": "<answer>"}),
    "length": ("Length", {"maxTokens": 50}),
    "function": ("Function", {"module": "team.rewards:score", "timeoutSeconds": 300}),
}

GRPO_RULES = (
    Case("GRPO with rewards", True, grpo(), GRPO_BLOCK),
    Case("GRPO without rewards", False, {"objective": {"type": "GRPO"}}, GRPO_BLOCK),
    Case(
        "GRPO block of DPO", False, {"objective": {"type": "DPO", "grpo": {"rewards": [{"type": "JSON"}]}}}, GRPO_BLOCK
    ),
    Case("GRPO with prompts", True, {**grpo(), **dataset(format="Prompts")}, GRPO_FORMAT),
    Case("GRPO with pairs", False, {**grpo(), **dataset(format="Preference")}, GRPO_FORMAT),
    Case("two groups of 8", True, grpo(), GROUPS),
    Case("three of 16 rows", False, grpo(generations=3), GROUPS),
    Case("two groups of 3", True, {**grpo(generations=3), "hyperparameters": {"batchSize": 6}}, GROUPS),
    Case(
        "half a group",
        False,
        {**grpo(), "hyperparameters": {"batchSize": 4, "gradientAccumulationSteps": 1}},
        GROUPS,
    ),
    Case("prompt and answer of 1024", True, grpo(maxPromptLength=768), GRPO_LENGTHS),
    Case("prompt and answer of 1025", False, grpo(maxPromptLength=769), GRPO_LENGTHS),
    Case("answer as long as all", False, {**grpo(), "hyperparameters": {"maxSequenceLength": 256}}, GRPO_LENGTHS),
    *(
        Case(f"reward {kind}", True, grpo({"type": kind, name: block}), f"rewards[].{name} belongs to type {kind}")
        for name, (kind, block) in REWARD_BLOCKS.items()
    ),
    *(
        Case(f"reward {kind} without block", False, grpo({"type": kind}), f"rewards[].{name} belongs to type {kind}")
        for name, (kind, _) in REWARD_BLOCKS.items()
    ),
    *(
        Case(f"{name} of JSON", False, grpo({"type": "JSON", name: block}), f"rewards[].{name} belongs to type {kind}")
        for name, (kind, block) in REWARD_BLOCKS.items()
    ),
    Case("exact match", True, grpo({"type": "ExactMatch", "exactMatch": {"column": "solution"}}), EXACT_MATCH),
    Case("exact match of JSON", False, grpo({"type": "JSON", "exactMatch": {}}), EXACT_MATCH),
    Case("JSON with keys", True, grpo({"type": "JSON", "json": {"requiredKeys": ["a"]}}), JSON_BLOCK),
    Case("JSON of exact match", False, grpo({"type": "ExactMatch", "json": {}}), JSON_BLOCK),
    Case("penalty", True, grpo({"type": "JSON", "weight": -0.5}), WEIGHT),
    Case("weight of zero", False, grpo({"type": "JSON", "weight": 0}), WEIGHT),
    *(
        Case(f"pattern {pattern}", True, grpo({"type": "Regex", "regex": {"pattern": pattern}}), PATTERN)
        for pattern in (r"^\d+$", "(?s)<think>.*</think>", r"[(?=]\\1", "(a|b)*c", "(?P<n>x){2,3}?", "[^]]+")
    ),
    *(
        Case(f"pattern {pattern}", False, grpo({"type": "Regex", "regex": {"pattern": pattern}}), PATTERN)
        for pattern in ("(", r"(a)\1", "a(?=b)", "(?<!a)b", "(?P<n>x)(?P=n)", "a++", "(?>a)", r"a\Z", "*")
    ),
    Case("target length", True, lengths(target=40), LENGTH_KIND),
    Case("shortest length", True, lengths(minTokens=40), LENGTH_KIND),
    Case("no length", False, lengths(), LENGTH_KIND),
    Case("target and bound", False, lengths(target=40, maxTokens=50), LENGTH_KIND),
    Case("range of lengths", True, lengths(minTokens=40, maxTokens=40), LENGTH_ORDER),
    Case("range upside down", False, lengths(minTokens=41, maxTokens=40), LENGTH_ORDER),
)

PPO_RULES = (
    Case("PPO with rewards", True, ppo(), PPO_BLOCK),
    Case("PPO without rewards", False, {"objective": {"type": "PPO"}}, PPO_BLOCK),
    Case(
        "PPO block of GRPO",
        False,
        {"objective": {"type": "GRPO", **{name: {"rewards": [{"type": "JSON"}]} for name in ("grpo", "ppo")}}},
        PPO_BLOCK,
    ),
    Case("PPO with prompts", True, {**ppo(), **dataset(format="Prompts")}, PPO_FORMAT),
    Case("PPO with pairs", False, {**ppo(), **dataset(format="Preference")}, PPO_FORMAT),
    Case("PPO with QLoRA", True, {**ppo(), "method": {"type": "QLoRA", "quantization": {}}}, PPO_METHOD),
    Case("PPO of all weights", False, {**ppo(), "method": {"type": "Full"}}, PPO_METHOD),
    Case("PPO with dropout 0", True, {**ppo(), "method": {"type": "LoRA", "lora": {"dropout": 0}}}, PPO_DROPOUT),
    Case("PPO with dropout", False, {**ppo(), "method": {"type": "LoRA", "lora": {"dropout": 0.1}}}, PPO_DROPOUT),
    Case("PPO without biases", True, {**ppo(), "method": {"type": "LoRA", "lora": {"bias": "None"}}}, PPO_BIAS),
    Case("PPO with biases", False, {**ppo(), "method": {"type": "LoRA", "lora": {"bias": "All"}}}, PPO_BIAS),
    Case("PPO on one CPU", True, {**ppo(), "resources": {"nodes": 1, "gpus": 0}}, PPO_PROCESSES),
    Case("PPO on one GPU by default", True, {**ppo(), "resources": {"cpu": 4}}, PPO_PROCESSES),
    Case("PPO on two GPUs", False, {**ppo(), "resources": {"gpus": 2}}, PPO_PROCESSES),
    Case("PPO on two CPUs", False, {**ppo(), "resources": {"nodes": 2, "gpus": 0}}, PPO_PROCESSES),
    Case("GRPO on two nodes with two GPUs", True, {**grpo(), "resources": {"nodes": 2, "gpus": 2}}, PPO_PROCESSES),
    Case("8 mini-batches of 2", True, ppo(miniBatches=8), MINI_BATCHES),
    Case("mini-batches of 5 1/3", False, ppo(miniBatches=3), MINI_BATCHES),
    Case("3 mini-batches of 4", True, {**ppo(miniBatches=3), "hyperparameters": {"batchSize": 3}}, MINI_BATCHES),
    *(
        Case(
            f"{kind} with the best model",
            good,
            {**spec, **dataset(validationFraction=0.1), "evaluation": {"loadBest": True}},
            "evaluation.loadBest and earlyStopping are not for objective PPO",
        )
        for kind, good, spec in (("SFT", True, {}), ("PPO", False, ppo()))
    ),
    Case("PPO prompt and answer of 1024", True, ppo(maxPromptLength=768), PPO_LENGTHS),
    Case("PPO prompt and answer of 1025", False, ppo(maxPromptLength=769), PPO_LENGTHS),
    Case("PPO answer as long as all", False, {**ppo(), "hyperparameters": {"maxSequenceLength": 256}}, PPO_LENGTHS),
)
