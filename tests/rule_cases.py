"""Cases of every validation rule: pydantic (`tests/unit/api/test_rules.py`) and the API server
(`tests/integration/test_crd.py`) must give the same verdict on each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from tunewright_api.base import Rule, SpecModel
from tunewright_api.v1alpha1.finetunejob import IMMUTABLE_MESSAGE

Document = dict[str, Any]

_TRAIN = [{"uri": "s3://datasets/train.jsonl"}]
_PREFIX = "tunewright.dev/"


@dataclass(frozen=True)
class Case:
    """A FineTuneJob that differs from a valid one in `changes`."""

    name: str
    accepted: bool
    changes: Document = field(default_factory=dict)
    """Top-level fields of the spec; None removes one."""
    part: str = ""
    """What a refusal must say, in Python and on the server: the rule's own message, or the field's path."""
    job_name: str = "case"

    def document(self) -> Document:
        """Return the FineTuneJob."""
        spec: Document = {
            "model": {"uri": "hf://organisation/name"},
            "dataset": {"train": _TRAIN},
            "method": {"type": "LoRA"},
            "output": {"uri": "s3://models/case"},
        }
        spec.update(copy.deepcopy(self.changes))
        return {
            "apiVersion": "tunewright.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": self.job_name},
            "spec": {key: value for key, value in spec.items() if value is not None},
        }


def _hub(**hub: Any) -> Document:
    return {"output": {"uri": "s3://models/case", "hub": {"repository": "org/name", **hub}}}


def _dataset(**more: Any) -> Document:
    return {"dataset": {"train": _TRAIN, **more}}


REVISION = "model.revision is only for hf:// models"
SOURCE_REVISION = "revision of a data source is only for hf://datasets/..."
HUB_NAME = "hub.repository may not have"
HUB_BRANCH = "hub.revision is a branch"
VALIDATION = "dataset.validation and dataset.validationFraction exclude each other"
TARGETS = "lora.targets and lora.targetModules exclude each other"
QUANT_BITS = "quantization.type and quantization.doubleQuant are only for bits: 4"
LORA_FULL = "method.lora is only for LoRA and QLoRA"
QLORA = "method.quantization belongs to QLoRA"
EPOCHS = "hyperparameters.epochs and hyperparameters.maxSteps exclude each other"
EVAL_STEPS = "evaluation.steps belongs to strategy Steps"
EVAL_ROWS = "evaluation needs rows to evaluate on"
NAME_LENGTH = "metadata.name may have at most 45 characters"
NAME_FORM = "metadata.name may have only lower-case letters"
POD_LABELS = "pod.labels may not start with tunewright.dev/"
POD_KEYS = "keys in pod.labels, pod.annotations and pod.nodeSelector are names"
POD_ANNOTATIONS = "pod.annotations may not start with tunewright.dev/"

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
GRPO_BLOCK = "objective.grpo belongs to objective.type GRPO"
GRPO_FORMAT = "objective GRPO learns from rows of format"
GROUPS = "objective GRPO compares whole groups of answers"
GRPO_LENGTHS = "grpo.maxPromptLength and grpo.maxCompletionLength (default 256) must fit together"
PPO_BLOCK = "objective.ppo belongs to objective.type PPO"
PPO_FORMAT = "objective PPO learns from rows of format"
PPO_METHOD = "objective PPO is only for method.type LoRA and QLoRA"
PPO_DROPOUT = "objective PPO trains without dropout"
PPO_BIAS = "objective PPO compares with the model without its adapter"
MINI_BATCHES = "objective PPO splits its rollouts into equal parts"
PPO_LENGTHS = "ppo.maxPromptLength and ppo.maxCompletionLength (default 256) must fit together"
PATTERN = "regex.pattern is no regular expression in RE2 syntax"
LENGTH_KIND = "length wants either a target, or minTokens, maxTokens or both"
LENGTH_ORDER = "length.minTokens may not be above length.maxTokens"
EXACT_MATCH = "rewards[].exactMatch is only for type ExactMatch"
JSON_BLOCK = "rewards[].json is only for type JSON"
WEIGHT = "rewards[].weight may not be 0"
PACKING = "hyperparameters.packing is only for objective SFT"
PREFIX_CHECKPOINTING = "hyperparameters.gradientCheckpointing does not work with PrefixTuning"

ONE_REFERENCE = "a reference names a result by exactly one of fineTuneJob and uri"
CONTINUED_METHOD = "model.continueFrom goes on from an adapter of the methods"
CONTINUED_SETTINGS = "model.continueFrom keeps the settings of the adapter"
CONTINUED_OBJECTIVE = "model.continueFrom is only for objectives that learn tokens"


def _continued(method: Document | None = None, objective: str = "SFT", **reference: str) -> Document:
    model = {"uri": "hf://organisation/name", "continueFrom": reference or {"fineTuneJob": "other"}}
    return {"model": model, "method": method or {"type": "LoRA"}, "objective": {"type": objective}}


SELECTION = "evaluation.loadBest and evaluation.earlyStopping need evaluations while training"
METRIC = "evaluation.metric is what loadBest and earlyStopping go by"
METRIC_OBJECTIVE = "evaluation.metric Accuracy is only for"
NEFTUNE = "hyperparameters.neftuneNoiseAlpha is only for objective SFT"


def _selecting(objective: str = "SFT", **evaluation: Any) -> Document:
    return {**_dataset(validationFraction=0.1), "objective": {"type": objective}, "evaluation": evaluation}


def _dpo(**settings: Any) -> Document:
    return {"objective": {"type": "DPO", "dpo": settings}}


def _grpo(*rewards: Document, **settings: Any) -> Document:
    return {"objective": {"type": "GRPO", "grpo": {"rewards": list(rewards or [{"type": "JSON"}]), **settings}}}


def _ppo(**settings: Any) -> Document:
    return {"objective": {"type": "PPO", "ppo": {"rewards": [{"type": "JSON"}], **settings}}}


def _lengths(**settings: Any) -> Document:
    return _grpo({"type": "Length", "length": settings})


REWARD_BLOCKS = {
    "model": ("Model", {"uri": "s3://models/judge"}),
    "regex": ("Regex", {"pattern": "<answer>"}),
    "length": ("Length", {"maxTokens": 50}),
}
GRPO_RULES = (
    Case("GRPO with rewards", True, _grpo(), GRPO_BLOCK),
    Case("GRPO without rewards", False, {"objective": {"type": "GRPO"}}, GRPO_BLOCK),
    Case(
        "GRPO block of DPO", False, {"objective": {"type": "DPO", "grpo": {"rewards": [{"type": "JSON"}]}}}, GRPO_BLOCK
    ),
    Case("GRPO with prompts", True, {**_grpo(), **_dataset(format="Prompts")}, GRPO_FORMAT),
    Case("GRPO with pairs", False, {**_grpo(), **_dataset(format="Preference")}, GRPO_FORMAT),
    Case("two groups of 8", True, _grpo(), GROUPS),
    Case("three of 16 rows", False, _grpo(generations=3), GROUPS),
    Case("two groups of 3", True, {**_grpo(generations=3), "hyperparameters": {"batchSize": 6}}, GROUPS),
    Case(
        "half a group",
        False,
        {**_grpo(), "hyperparameters": {"batchSize": 4, "gradientAccumulationSteps": 1}},
        GROUPS,
    ),
    Case("prompt and answer of 1024", True, _grpo(maxPromptLength=768), GRPO_LENGTHS),
    Case("prompt and answer of 1025", False, _grpo(maxPromptLength=769), GRPO_LENGTHS),
    Case("answer as long as all", False, {**_grpo(), "hyperparameters": {"maxSequenceLength": 256}}, GRPO_LENGTHS),
    *(
        Case(f"reward {kind}", True, _grpo({"type": kind, name: block}), f"rewards[].{name} belongs to type {kind}")
        for name, (kind, block) in REWARD_BLOCKS.items()
    ),
    *(
        Case(f"reward {kind} without block", False, _grpo({"type": kind}), f"rewards[].{name} belongs to type {kind}")
        for name, (kind, _) in REWARD_BLOCKS.items()
    ),
    *(
        Case(f"{name} of JSON", False, _grpo({"type": "JSON", name: block}), f"rewards[].{name} belongs to type {kind}")
        for name, (kind, block) in REWARD_BLOCKS.items()
    ),
    Case("exact match", True, _grpo({"type": "ExactMatch", "exactMatch": {"column": "solution"}}), EXACT_MATCH),
    Case("exact match of JSON", False, _grpo({"type": "JSON", "exactMatch": {}}), EXACT_MATCH),
    Case("JSON with keys", True, _grpo({"type": "JSON", "json": {"requiredKeys": ["a"]}}), JSON_BLOCK),
    Case("JSON of exact match", False, _grpo({"type": "ExactMatch", "json": {}}), JSON_BLOCK),
    Case("penalty", True, _grpo({"type": "JSON", "weight": -0.5}), WEIGHT),
    Case("weight of zero", False, _grpo({"type": "JSON", "weight": 0}), WEIGHT),
    *(
        Case(f"pattern {pattern}", True, _grpo({"type": "Regex", "regex": {"pattern": pattern}}), PATTERN)
        for pattern in (r"^\d+$", "(?s)<think>.*</think>", r"[(?=]\\1", "(a|b)*c", "(?P<n>x){2,3}?", "[^]]+")
    ),
    *(
        Case(f"pattern {pattern}", False, _grpo({"type": "Regex", "regex": {"pattern": pattern}}), PATTERN)
        for pattern in ("(", r"(a)\1", "a(?=b)", "(?<!a)b", "(?P<n>x)(?P=n)", "a++", "(?>a)", r"a\Z", "*")
    ),
    Case("target length", True, _lengths(target=40), LENGTH_KIND),
    Case("shortest length", True, _lengths(minTokens=40), LENGTH_KIND),
    Case("no length", False, _lengths(), LENGTH_KIND),
    Case("target and bound", False, _lengths(target=40, maxTokens=50), LENGTH_KIND),
    Case("range of lengths", True, _lengths(minTokens=40, maxTokens=40), LENGTH_ORDER),
    Case("range upside down", False, _lengths(minTokens=41, maxTokens=40), LENGTH_ORDER),
)

PPO_RULES = (
    Case("PPO with rewards", True, _ppo(), PPO_BLOCK),
    Case("PPO without rewards", False, {"objective": {"type": "PPO"}}, PPO_BLOCK),
    Case(
        "PPO block of GRPO",
        False,
        {"objective": {"type": "GRPO", **{name: {"rewards": [{"type": "JSON"}]} for name in ("grpo", "ppo")}}},
        PPO_BLOCK,
    ),
    Case("PPO with prompts", True, {**_ppo(), **_dataset(format="Prompts")}, PPO_FORMAT),
    Case("PPO with pairs", False, {**_ppo(), **_dataset(format="Preference")}, PPO_FORMAT),
    Case("PPO with QLoRA", True, {**_ppo(), "method": {"type": "QLoRA", "quantization": {}}}, PPO_METHOD),
    Case("PPO of all weights", False, {**_ppo(), "method": {"type": "Full"}}, PPO_METHOD),
    Case("PPO with dropout 0", True, {**_ppo(), "method": {"type": "LoRA", "lora": {"dropout": 0}}}, PPO_DROPOUT),
    Case("PPO with dropout", False, {**_ppo(), "method": {"type": "LoRA", "lora": {"dropout": 0.1}}}, PPO_DROPOUT),
    Case("PPO without biases", True, {**_ppo(), "method": {"type": "LoRA", "lora": {"bias": "None"}}}, PPO_BIAS),
    Case("PPO with biases", False, {**_ppo(), "method": {"type": "LoRA", "lora": {"bias": "All"}}}, PPO_BIAS),
    Case("8 mini-batches of 2", True, _ppo(miniBatches=8), MINI_BATCHES),
    Case("mini-batches of 5 1/3", False, _ppo(miniBatches=3), MINI_BATCHES),
    Case("3 mini-batches of 4", True, {**_ppo(miniBatches=3), "hyperparameters": {"batchSize": 3}}, MINI_BATCHES),
    *(
        Case(
            f"{kind} with the best model",
            good,
            {**spec, **_dataset(validationFraction=0.1), "evaluation": {"loadBest": True}},
            "evaluation.loadBest and earlyStopping are not for objective PPO",
        )
        for kind, good, spec in (("SFT", True, {}), ("PPO", False, _ppo()))
    ),
    Case("PPO prompt and answer of 1024", True, _ppo(maxPromptLength=768), PPO_LENGTHS),
    Case("PPO prompt and answer of 1025", False, _ppo(maxPromptLength=769), PPO_LENGTHS),
    Case("PPO answer as long as all", False, {**_ppo(), "hyperparameters": {"maxSequenceLength": 256}}, PPO_LENGTHS),
)


RULES = (
    *GRPO_RULES,
    *PPO_RULES,
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
            {**_dataset(format=data_format), "objective": {"type": kind}},
            f"objective {kind} learns from rows of format",
        )
        for kind, data_format in OBJECTIVES.values()
    ),
    *(
        Case(
            f"{kind} with rows of another format",
            False,
            {**_dataset(format="Labelled" if kind != "Classification" else "Text"), "objective": {"type": kind}},
            f"objective {kind} learns from rows of format",
        )
        for kind, _ in OBJECTIVES.values()
    ),
    Case("smoothed sigmoid", True, _dpo(labelSmoothing=0.1), SMOOTHING),
    Case("smoothed hinge", False, _dpo(labelSmoothing=0.1, loss="Hinge"), SMOOTHING),
    Case("exo with smoothing", True, _dpo(labelSmoothing=0.001, loss="EXOPair"), EXO),
    Case("exo without smoothing", False, _dpo(loss="EXOPair"), EXO),
    *(
        Case(
            f"bias for {kind}",
            good,
            {"objective": {"type": kind}, "method": {"type": "LoRA", "lora": {"bias": "All"}}},
            "lora.bias is not for DPO and KTO",
        )
        for kind, good in (("SFT", True), ("Reward", True), ("DPO", False), ("KTO", False))
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
    Case("reference by name", True, _continued(fineTuneJob="other"), ONE_REFERENCE),
    Case("reference by URI", True, _continued(uri="s3://models/other/0123456789abcdef"), ONE_REFERENCE),
    Case("reward model by name", True, _grpo({"type": "Model", "model": {"fineTuneJob": "judge"}}), ONE_REFERENCE),
    Case("reward model by nothing", False, _grpo({"type": "Model", "model": {}}), ONE_REFERENCE),
    Case("empty reference", False, {"model": {"uri": "hf://a/b", "continueFrom": {}}}, ONE_REFERENCE),
    Case("reference by both", False, _continued(fineTuneJob="other", uri="s3://models/other"), ONE_REFERENCE),
    *(
        Case(f"going on with {method['type']}", True, _continued(method), CONTINUED_METHOD)
        for method in ({"type": "LoRA"}, {"type": "QLoRA", "quantization": {}}, {"type": "IA3"})
    ),
    *(
        Case(f"going on with {kind}", False, _continued({"type": kind}), CONTINUED_METHOD)
        for kind in ("Full", "PrefixTuning", "PromptTuning")
    ),
    Case(
        "quantization for another adapter", True, _continued({"type": "QLoRA", "quantization": {}}), CONTINUED_SETTINGS
    ),
    *(
        Case(f"going on with settings of {kind}", False, _continued({"type": kind, name: {}}), CONTINUED_SETTINGS)
        for kind, name in (("LoRA", "lora"), ("IA3", "ia3"))
    ),
    *(Case(f"going on with {kind}", True, _continued(objective=kind), CONTINUED_OBJECTIVE) for kind in ("DPO", "KTO")),
    *(
        Case(f"going on with {kind}", False, _continued(objective=kind), CONTINUED_OBJECTIVE)
        for kind in ("Reward", "Classification")
    ),
    Case("hub model with revision", True, {"model": {"uri": "hf://a/b", "revision": "main"}}, REVISION),
    Case("bucket model with revision", False, {"model": {"uri": "s3://bucket/b", "revision": "main"}}, REVISION),
    Case(
        "hub rows with revision",
        True,
        {"dataset": {"train": [{"uri": "hf://datasets/a/b/train.jsonl", "revision": "v1"}]}},
        SOURCE_REVISION,
    ),
    Case(
        "bucket rows with revision",
        False,
        {"dataset": {"train": [{"uri": "s3://bucket/train.jsonl", "revision": "v1"}]}},
        SOURCE_REVISION,
    ),
    Case("hub repository", True, _hub(repository="my-org/Name-1.0_x"), HUB_NAME),
    *(
        Case(f"hub repository {name}", False, _hub(repository=name), HUB_NAME)
        for name in ("org/a--b", "org/a..b", "org-/name", "org/name.", "org/name.git")
    ),
    Case("hub branch", True, _hub(revision="release/v1.2", private=False, commitMessage="Third try"), HUB_BRANCH),
    Case("hub commit", False, _hub(revision="0123456789" * 4), HUB_BRANCH),
    Case("validation files", True, _dataset(validation=_TRAIN), VALIDATION),
    Case("validation fraction", True, _dataset(validationFraction=0.1), VALIDATION),
    Case("both validations", False, _dataset(validation=_TRAIN, validationFraction=0.1), VALIDATION),
    *(
        Case(f"{name} alone", True, _dataset(**{name: "{prompt} A:"}), "dataset.promptTemplate and")
        for name in ("promptTemplate", "responseTemplate")
    ),
    Case(
        "both templates",
        False,
        _dataset(promptTemplate="{prompt}", responseTemplate="A:"),
        "dataset.promptTemplate and",
    ),
    *(
        Case(
            f"{name} for {data_format}", good, _dataset(**{name: "{x}"}, format=data_format), f"dataset.{name} is only"
        )
        for name, data_format, good in (
            ("promptTemplate", "Alpaca", True),
            ("promptTemplate", "Messages", False),
            ("responseTemplate", "Text", True),
            ("responseTemplate", "Alpaca", False),
        )
    ),
    *(
        Case(
            f"weight {weight} with validationFraction",
            weight <= 1,
            {"dataset": {"train": [{**_TRAIN[0], "weight": weight}], "validationFraction": 0.1}},
            "dataset.validationFraction does not go with weights above 1",
        )
        for weight in (0.5, 2.0)
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
    Case("epochs", True, {"hyperparameters": {"epochs": 2.5}}, EPOCHS),
    Case("steps", True, {"hyperparameters": {"maxSteps": 10}}, EPOCHS),
    Case("epochs and steps", False, {"hyperparameters": {"epochs": 1.0, "maxSteps": 10}}, EPOCHS),
    Case(
        "evaluation by steps",
        True,
        {**_dataset(validationFraction=0.1), "evaluation": {"strategy": "Steps", "steps": 5}},
        EVAL_STEPS,
    ),
    Case(
        "evaluation by steps without number",
        False,
        {**_dataset(validationFraction=0.1), "evaluation": {"strategy": "Steps"}},
        EVAL_STEPS,
    ),
    Case(
        "evaluation by epoch with number",
        False,
        {**_dataset(validationFraction=0.1), "evaluation": {"strategy": "Epoch", "steps": 5}},
        EVAL_STEPS,
    ),
    Case("evaluation with rows", True, {**_dataset(validation=_TRAIN), "evaluation": {"strategy": "Epoch"}}, EVAL_ROWS),
    Case("no evaluation", True, {"evaluation": {"strategy": "None"}}, EVAL_ROWS),
    Case("evaluation without rows", False, {"evaluation": {"strategy": "Epoch"}}, EVAL_ROWS),
    Case("best model with rows", True, _selecting(loadBest=True, earlyStopping={}), EVAL_ROWS),
    Case("best model without rows", False, {"evaluation": {"loadBest": True}}, EVAL_ROWS),
    Case("early stopping without rows", False, {"evaluation": {"earlyStopping": {"patience": 2}}}, EVAL_ROWS),
    Case("best model by epoch", True, _selecting(strategy="Epoch", loadBest=True), SELECTION),
    Case("last model without evaluation", True, _selecting(strategy="None", loadBest=False), SELECTION),
    Case("best model without evaluation", False, _selecting(strategy="None", loadBest=True), SELECTION),
    Case("early stopping without evaluation", False, _selecting(strategy="None", earlyStopping={}), SELECTION),
    Case("metric of the best model", True, _selecting(metric="Loss", loadBest=True), METRIC),
    Case("metric of early stopping", True, _selecting(metric="Loss", earlyStopping={}), METRIC),
    Case("metric of nothing", False, _selecting(metric="Loss"), METRIC),
    Case("F1 of a classifier", True, _selecting("Classification", metric="F1", loadBest=True), METRIC_OBJECTIVE),
    Case("accuracy of a reward model", True, _selecting("Reward", metric="Accuracy", loadBest=True), METRIC_OBJECTIVE),
    Case("F1 of a reward model", False, _selecting("Reward", metric="F1", loadBest=True), METRIC_OBJECTIVE),
    Case("accuracy of a chat model", False, _selecting(metric="Accuracy", loadBest=True), METRIC_OBJECTIVE),
    Case("noise for SFT", True, {"hyperparameters": {"neftuneNoiseAlpha": 5}}, NEFTUNE),
    Case(
        "noise for DPO", False, {"hyperparameters": {"neftuneNoiseAlpha": 5.5}, "objective": {"type": "DPO"}}, NEFTUNE
    ),
    Case("name of 45 characters", True, part=NAME_LENGTH, job_name="n" * 45),
    Case("name of 46 characters", False, part=NAME_LENGTH, job_name="n" * 46),
    Case("name with hyphen", True, part=NAME_FORM, job_name="a-1"),
    Case("name with dot", False, part=NAME_FORM, job_name="a.b"),
    Case("pod label", True, {"pod": {"labels": {"team": "a", "example.org/x": "b"}}}, POD_LABELS),
    Case("reserved pod label", False, {"pod": {"labels": {f"{_PREFIX}attempt": "9"}}}, POD_LABELS),
    Case("pod annotation", True, {"pod": {"annotations": {"note": "free text, even long"}}}, POD_ANNOTATIONS),
    Case("reserved pod annotation", False, {"pod": {"annotations": {f"{_PREFIX}x": "9"}}}, POD_ANNOTATIONS),
    Case(
        "keys with and without a domain",
        True,
        {"pod": {"labels": {"team": "a"}, "annotations": {"example.com/x": "1"}, "nodeSelector": {"a.b/c-d_e": "x"}}},
        POD_KEYS,
    ),
    *(
        Case(f"bad key in {name}", False, {"pod": {name: {key: "x"}}}, POD_KEYS)
        for name, key in (("labels", "a b"), ("annotations", "/x"), ("nodeSelector", "a/b/c"))
    ),
)
"""Rules written as CEL on the server and as predicates in Python; `part` is the start of the rule's message."""


def _uris(what: str, path: str, wrap: Any, good: tuple[str, ...], bad: tuple[str, ...]) -> tuple[Case, ...]:
    accepted = tuple(Case(f"{what} {uri}", True, wrap(uri)) for uri in good)
    return accepted + tuple(Case(f"{what} {uri}", False, wrap(uri), path) for uri in bad)


URIS = (
    *_uris(
        "model",
        "model.uri",
        lambda uri: {"model": {"uri": uri}},
        ("hf://org/Name-1.0_x", "s3://bucket", "s3://bucket/prefix/", "s3://my.bucket-1/a/b=c", "pvc://claim/a/b"),
        ("org/name", "hf://org", "https://bucket/x", "s3://B/x", "s3://bucket/../x", "pvc://claim", "/local/path", ""),
    ),
    *_uris(
        "data",
        "dataset.train[0].uri",
        lambda uri: {"dataset": {"train": [{"uri": uri}]}},
        ("s3://bucket/train.jsonl", "pvc://claim/data/train.parquet", "hf://datasets/org/name-1.0/data/train.csv"),
        (
            "hf://datasets/org/name",
            "hf://org/name/train.jsonl",
            "hf://datasets/org/name@v1/train.jsonl",
            "hf://org/name",
            "s3://bucket",
            "s3://bucket/a/",
            "s3://bucket//a",
            "pvc://claim/.hidden",
            "file:///x",
        ),
    ),
    *_uris(
        "output",
        "output.uri",
        lambda uri: {"output": {"uri": uri}},
        ("s3://bucket/prefix", "s3://bucket/prefix/", "pvc://claim/path"),
        ("s3://bucket", "hf://org/name", "s3://bucket/a b", "pvc://claim", "relative/path"),
    ),
    *_uris(
        "result",
        "model.continueFrom.uri",
        lambda uri: _continued(uri=uri),
        ("s3://bucket/out", "s3://bucket/out/0123456789abcdef/manifest.json", "pvc://claim/out/0123456789abcdef/"),
        ("s3://bucket", "hf://org/name", "s3://bucket/../x", "pvc://claim", "other-job", "/local/path"),
    ),
    *(
        Case(f"reference to {name}", False, _continued(fineTuneJob=name), "model.continueFrom.fineTuneJob")
        for name in ("A", "team-b/a", "a.b", "n" * 46, "-a")
    ),
)
"""Addresses, by the patterns of `tunewright_api.base`."""


SCHEMA = (
    Case("PPO lambda above 1", False, _ppo(**{"lambda": 1.1}), "objective.ppo.lambda"),
    Case("no rewards", False, {"objective": {"type": "GRPO", "grpo": {"rewards": []}}}, "objective.grpo.rewards"),
    Case("nine rewards", False, _grpo(*[{"type": "JSON"}] * 9), "objective.grpo.rewards"),
    Case(
        "long pattern",
        False,
        _grpo({"type": "Regex", "regex": {"pattern": "a" * 513}}),
        "objective.grpo.rewards[0].regex.pattern",
    ),
    Case(
        "hub reward model",
        False,
        _grpo({"type": "Model", "model": {"uri": "hf://org/name"}}),
        "objective.grpo.rewards[0].model.uri",
    ),
    Case("smallest", True),
    Case("no model", False, {"model": None}, "model"),
    Case("no data", False, {"dataset": {"train": []}}, "dataset.train"),
    Case("too many files", False, {"dataset": {"train": _TRAIN * 33}}, "dataset.train"),
    Case("unknown method", False, {"method": {"type": "Magic"}}, "method.type"),
    Case("number in quotes", False, {"hyperparameters": {"learningRate": "2e-4"}}, "hyperparameters.learningRate"),
    Case("learning rate of zero", False, {"hyperparameters": {"learningRate": 0}}, "hyperparameters.learningRate"),
    Case("whole number for a rate", True, {"hyperparameters": {"learningRate": 1}}),
    Case("patience of zero", False, _selecting(earlyStopping={"patience": 0}), "evaluation.earlyStopping.patience"),
    Case("further arguments", True, {"hyperparameters": {"extra": {"adam_beta2": 0.95, "torch_compile": False}}}),
    Case(
        "too many further arguments",
        False,
        {"hyperparameters": {"extra": {f"a{n}": n for n in range(33)}}},
        "hyperparameters.extra",
    ),
    Case(
        "tracking",
        True,
        {"tracking": {"tensorboard": True, "mlflow": {"uri": "http://mlflow.ml:5000/a", "experiment": "Team A"}}},
    ),
    Case("tracking by file", False, {"tracking": {"mlflow": {"uri": "file:///tmp/x"}}}, "tracking.mlflow.uri"),
    Case("password in a URL", False, {"tracking": {"mlflow": {"uri": "http://a:b@host"}}}, "tracking.mlflow.uri"),
    Case("fraction of one", False, _dataset(validationFraction=1.0), "dataset.validationFraction"),
    Case("two GPUs", False, {"resources": {"gpus": 2}}, "resources.gpus"),
    Case("cpu as number", True, {"resources": {"cpu": 4, "memory": "16Gi", "ephemeralStorage": "1.5Ti"}}),
    Case("bad quantity", False, {"resources": {"memory": "16 GB"}}, "resources.memory"),
    Case("timeouts", True, {"retry": {"maxRestarts": 0, "timeouts": {"queue": "90s", "run": "12h", "stall": "5m"}}}),
    Case("bad duration", False, {"retry": {"timeouts": {"run": "1.5h"}}}, "retry.timeouts.run"),
    Case("duration of zero", False, {"ttlAfterFinished": "0s"}, "ttlAfterFinished"),
    Case("endpoint", True, {"storage": {"endpoint": "http://10.0.0.1:9000", "secretName": "s3"}}),
    Case("endpoint without scheme", False, {"storage": {"endpoint": "minio:9000"}}, "storage.endpoint"),
    Case("hub", True, {"hub": {"secretName": "hf-token", "endpoint": "https://hub.example.com"}}),
    Case("hub endpoint with a path", False, {"hub": {"endpoint": "https://hub.example.com/x"}}, "hub.endpoint"),
    Case("hub output without a namespace", False, _hub(repository="name"), "output.hub.repository"),
    Case("hub branch out of bounds", False, _hub(revision="a/../b"), "output.hub.revision"),
    Case("empty commit message", False, _hub(commitMessage=""), "output.hub.commitMessage"),
    Case(
        "whole pod",
        True,
        {
            "pod": {
                "image": "registry:5000/trainer:1",
                "imagePullSecrets": [{"name": "registry"}],
                "serviceAccountName": "trainer",
                "nodeSelector": {"gpu": "a100"},
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "priorityClassName": "high",
                "runtimeClassName": "nvidia",
            }
        },
    ),
)
"""Bounds and types of the schema."""

CASES = (*RULES, *URIS, *SCHEMA)

UNKNOWN_FIELDS = (
    ({"hyperparameters": {"learningrate": 1e-4}}, "learningrate", "learningRate"),
    ({"outptu": {"uri": "s3://b/x"}}, "outptu", "output"),
    ({"pod": {"securityContext": {"privileged": True}}}, "securityContext", None),
    ({"pod": {"hostNetwork": True}}, "hostNetwork", None),
    (_continued(finetuneJob="other"), "finetuneJob", "fineTuneJob"),
)
"""Misspelt or forbidden fields: changes, the field, and the name that is meant."""


@dataclass(frozen=True)
class Update:
    """A merge patch to the spec of an existing FineTuneJob."""

    name: str
    accepted: bool
    patch: Document
    part: str = ""


_BEFORE: Document = {
    "objective": {"type": "SFT"},
    "hyperparameters": {"epochs": 1.0, "extra": {"adam_beta2": 0.95}},
    "evaluation": {"strategy": "None"},
    "storage": {"region": "us-east-1"},
    "hub": {"secretName": "a"},
    "resources": {"gpus": 1},
    "pod": {"image": "a"},
    "tracking": {"tensorboard": True},
}
_CHANGED: Document = {
    "model": {"uri": "hf://other/name"},
    "dataset": {"format": "Text"},
    "objective": {"type": "DPO"},
    "method": {"type": "Full"},
    "output": {"uri": "s3://models/other"},
    "hyperparameters": {"epochs": 2.0},
    "evaluation": {"strategy": "Epoch"},
    "storage": {"region": "eu-west-1"},
    "hub": {"secretName": "b"},
    "resources": {"gpus": 0},
    "pod": {"image": "b"},
    "tracking": {"tensorboard": False},
}

BEFORE = Case("before updates", True, _BEFORE, job_name="updated")
UPDATES = (
    Update("suspend", True, {"suspend": True}),
    Update("retry", True, {"retry": {"maxRestarts": 9, "timeouts": {"run": "1h"}}}),
    Update(
        "change a further argument",
        False,
        {"hyperparameters": {"extra": {"adam_beta2": 0.9}}},
        f"spec.hyperparameters {IMMUTABLE_MESSAGE}",
    ),
    Update("ttl", True, {"ttlAfterFinished": "1h"}),
    *(
        Update(f"change {name}", False, {name: change}, f"spec.{name} {IMMUTABLE_MESSAGE}")
        for name, change in _CHANGED.items()
    ),
    *(Update(f"remove {name}", False, {name: None}, f"spec.{name} {IMMUTABLE_MESSAGE}") for name in _BEFORE),
    *(Update(f"keep {name}", True, {name: value}) for name, value in _BEFORE.items()),
    *(
        Update(f"keep {name}", True, {name: BEFORE.document()["spec"][name]})
        for name in ("model", "dataset", "method", "output")
    ),
)
"""Immutability, a matter of the server alone."""


def all_rules() -> list[Rule]:
    """Return every rule of the models."""
    found, line = [], [SpecModel]
    while line:
        model = line.pop()
        line.extend(model.__subclasses__())
        found.extend(model.__dict__.get("RULES", ()))
    return found
