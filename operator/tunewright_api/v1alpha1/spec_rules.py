"""Rules of a FineTuneJob that span several blocks of its spec; those of one block stand with the block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic.alias_generators import to_snake

from tunewright_api.base import Rule
from tunewright_api.v1alpha1.method import MethodType
from tunewright_api.v1alpha1.objective import Objective, ObjectiveType
from tunewright_api.v1alpha1.parts import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_GRADIENT_ACCUMULATION_STEPS,
    DEFAULT_MAX_SEQUENCE_LENGTH,
    DataFormat,
    Optimizer,
)

if TYPE_CHECKING:
    from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec

FORMATS: dict[ObjectiveType, tuple[DataFormat, ...]] = {
    "SFT": ("Text", "PromptCompletion", "Messages", "Alpaca", "ShareGPT"),
    "DPO": ("Preference",),
    "KTO": ("UnpairedPreference", "Preference"),
    "Reward": ("Preference",),
    "GRPO": ("Prompts",),
    "PPO": ("Prompts",),
    "Classification": ("Labelled",),
}
"""Formats that an objective can learn from; Auto chooses among them."""
CONTINUED_METHODS: tuple[MethodType, ...] = ("LoRA", "QLoRA", "IA3")
"""Methods that can go on from an adapter; peft does not train a loaded prefix or prompt any further."""
MERGED_METHODS: tuple[MethodType, ...] = ("LoRA", "QLoRA", "IA3")
"""Methods whose adapters can be merged into the base's weights."""
WITH_HEAD: tuple[ObjectiveType, ...] = ("Reward", "Classification")
"""Objectives whose models have a head on the last token; the others' write tokens."""
COMPARED_WITH_START: tuple[ObjectiveType, ...] = ("DPO", "KTO", "GRPO", "PPO")
"""Objectives whose reference is the model without its adapter, or with the adapter that it goes on from."""
FSDP_METHODS: tuple[MethodType, ...] = ("Full", "LoRA", "QLoRA", "IA3")
"""Methods that a model spread over processes is trained with: virtual tokens are put in before the first layer gathers
its weights."""
FSDP_OBJECTIVES: tuple[ObjectiveType, ...] = ("SFT", "DPO", "KTO", "Reward", "Classification")
"""Objectives that such a model is trained for; the others' answers would gather all weights for each token."""
FSDP_OPTIMIZERS: tuple[Optimizer, ...] = ("AdamW", "SGD")
"""Optimizers whose update of a weight needs only the weight's own gradient, so a share is updated like the whole."""
_DEFAULTS = {
    "batchSize": DEFAULT_BATCH_SIZE,
    "gradientAccumulationSteps": DEFAULT_GRADIENT_ACCUMULATION_STEPS,
    "maxSequenceLength": DEFAULT_MAX_SEQUENCE_LENGTH,
}
_OBJECTIVE = "(has(self.objective) && has(self.objective.type) ? self.objective.type : 'SFT')"


def type_of(objective: Objective | None) -> ObjectiveType:
    """Return the type of an objective that need not be given."""
    return objective.type if objective is not None else "SFT"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _format_rule(kind: ObjectiveType) -> Rule:
    names = ", ".join(FORMATS[kind])
    return Rule(
        f"{_OBJECTIVE} != '{kind}' || !has(self.dataset.format) || "
        f"self.dataset.format in [{_listed(('Auto', *FORMATS[kind]))}]",
        f"objective {kind} learns from rows of format {names}: set dataset.format to one of them or to Auto",
        lambda s: type_of(s.objective) != kind or s.dataset.format in ("Auto", *FORMATS[kind]),
    )


def _hyperparameter(field: str) -> str:
    """Return CEL for a training argument with its default."""
    default = _DEFAULTS[field]
    return (
        f"(has(self.hyperparameters) && has(self.hyperparameters.{field}) ? self.hyperparameters.{field} : {default})"
    )


def _value(spec: FineTuneJobSpec, field: str) -> int:
    given: int | None = getattr(spec.hyperparameters, to_snake(field), None)
    return _DEFAULTS[field] if given is None else given


def _whole_parts(kind: Literal["GRPO", "PPO"], field: str, default: int, why: str) -> Rule:
    """Answers of a step must split evenly by a field of the objective's block."""
    block = kind.lower()

    def holds(spec: FineTuneJobSpec) -> bool:
        settings: Any = getattr(spec.objective, block, None)
        answers = _value(spec, "batchSize") * _value(spec, "gradientAccumulationSteps")
        return settings is None or answers % getattr(settings, to_snake(field)) == 0

    path = f"self.objective.{block}"
    return Rule(
        f"!(has(self.objective) && has({path})) || "
        f"{_hyperparameter('batchSize')} * {_hyperparameter('gradientAccumulationSteps')} % "
        f"(has({path}.{field}) ? {path}.{field} : {default}) == 0",
        f"objective {kind} {why}: hyperparameters.batchSize (default {DEFAULT_BATCH_SIZE}) times "
        f"gradientAccumulationSteps (default {DEFAULT_GRADIENT_ACCUMULATION_STEPS}) must be a multiple of "
        f"{block}.{field} (default {default})",
        holds,
    )


def _answer_fits(kind: Literal["GRPO", "PPO"]) -> Rule:
    """Prompt and answer must fit into the sequence together."""
    block = kind.lower()

    def holds(spec: FineTuneJobSpec) -> bool:
        settings: Any = getattr(spec.objective, block, None)
        if settings is None:
            return True
        longest: int = (settings.max_prompt_length or 1) + settings.max_completion_length
        return longest <= _value(spec, "maxSequenceLength")

    path = f"self.objective.{block}"
    return Rule(
        f"!(has(self.objective) && has({path})) || (has({path}.maxPromptLength) ? {path}.maxPromptLength : 1) + "
        f"(has({path}.maxCompletionLength) ? {path}.maxCompletionLength : 256) <= "
        f"{_hyperparameter('maxSequenceLength')}",
        f"{block}.maxPromptLength and {block}.maxCompletionLength (default 256) must fit together into "
        f"hyperparameters.maxSequenceLength (default {DEFAULT_MAX_SEQUENCE_LENGTH}): lower one of them, or raise it",
        holds,
    )


def _is_kto(spec: FineTuneJobSpec) -> bool:
    """Tell whether the loss takes its reference point from the other answers of a batch; APOZeroUnpaired has none."""
    kto = spec.objective.kto if spec.objective is not None else None
    return type_of(spec.objective) == "KTO" and (kto is None or kto.loss == "KTO")


_PPO_RULES = (
    Rule(
        f"{_OBJECTIVE} != 'PPO' || !has(self.evaluation) || "
        "(!(has(self.evaluation.loadBest) && self.evaluation.loadBest) && !has(self.evaluation.earlyStopping))",
        "evaluation.loadBest and earlyStopping are not for objective PPO: remove them",
        lambda s: (
            type_of(s.objective) != "PPO"
            or s.evaluation is None
            or (not s.evaluation.load_best and s.evaluation.early_stopping is None)
        ),
    ),
    Rule(
        f"{_OBJECTIVE} != 'PPO' || self.method.type in ['LoRA', 'QLoRA']",
        "objective PPO is only for method.type LoRA and QLoRA: its reference is the model without the adapter",
        lambda s: type_of(s.objective) != "PPO" or s.method.type in ("LoRA", "QLoRA"),
    ),
    Rule(
        f"{_OBJECTIVE} != 'PPO' || !has(self.method.lora) || !has(self.method.lora.dropout) || "
        "self.method.lora.dropout == 0.0",
        "objective PPO trains without dropout, which would change likelihoods that it compares: remove lora.dropout",
        lambda s: type_of(s.objective) != "PPO" or s.method.lora is None or not s.method.lora.dropout,
    ),
    Rule(
        f"{_OBJECTIVE} != 'PPO' || !has(self.resources) || "
        "((!has(self.resources.gpus) || self.resources.gpus <= 1) && "
        "(!has(self.resources.nodes) || self.resources.nodes == 1))",
        "objective PPO trains in one process: set resources.gpus to 0 or 1 and resources.nodes to 1",
        lambda s: (
            type_of(s.objective) != "PPO" or s.resources is None or s.resources.nodes * s.resources.processes == 1
        ),
    ),
)


def _with_fsdp(cel: str, message: str, holds: Callable[[FineTuneJobSpec], bool]) -> Rule:
    """What must hold where the model is spread over processes."""
    return Rule(
        f"!has(self.resources) || !has(self.resources.parallelism) || self.resources.parallelism != 'FSDP' || ({cel})",
        f"resources.parallelism FSDP {message}",
        lambda s: s.resources is None or s.resources.parallelism != "FSDP" or holds(s),
    )


_FSDP_RULES = (
    _with_fsdp(
        f"self.method.type in [{_listed(FSDP_METHODS)}]",
        f"is for methods {', '.join(FSDP_METHODS)}: set it to DDP, or take one of these",
        lambda s: s.method.type in FSDP_METHODS,
    ),
    _with_fsdp(
        "!has(self.method.quantization) || !has(self.method.quantization.bits) || self.method.quantization.bits == 4",
        "spreads quantized weights of 4 bits: set method.quantization.bits to 4, or it to DDP",
        lambda s: s.method.quantization is None or s.method.quantization.bits == 4,
    ),
    _with_fsdp(
        f"{_OBJECTIVE} in [{_listed(FSDP_OBJECTIVES)}]",
        f"is for objectives {', '.join(FSDP_OBJECTIVES)}: set it to DDP",
        lambda s: type_of(s.objective) in FSDP_OBJECTIVES,
    ),
    _with_fsdp(
        "!has(self.method.lora) || (!has(self.method.lora.modulesToSave) && "
        "(!has(self.method.lora.bias) || self.method.lora.bias == 'None'))",
        "keeps all weights of the base frozen with LoRA: remove lora.modulesToSave and lora.bias, or set it to DDP",
        lambda s: s.method.lora is None or (s.method.lora.modules_to_save is None and s.method.lora.bias == "None"),
    ),
    _with_fsdp(
        "!has(self.model.dtype) || self.model.dtype != 'Float16'",
        "does not go with model.dtype Float16, whose loss scaling would differ between processes: use BFloat16",
        lambda s: s.model.dtype != "Float16",
    ),
    _with_fsdp(
        "self.method.type != 'Full' || !has(self.hyperparameters) || !has(self.hyperparameters.optimizer) || "
        f"self.hyperparameters.optimizer in [{_listed(FSDP_OPTIMIZERS)}]",
        f"trains all weights with hyperparameters.optimizer {' or '.join(FSDP_OPTIMIZERS)}",
        lambda s: (
            s.method.type != "Full"
            or s.hyperparameters is None
            or s.hyperparameters.optimizer in (None, *FSDP_OPTIMIZERS)
        ),
    ),
)

SPEC_RULES: tuple[Rule, ...] = (
    Rule(
        f"!has(self.output.merge) || self.method.type in [{_listed(MERGED_METHODS)}]",
        "output.merge is only for LoRA, QLoRA and IA3: Full publishes a whole model anyway, and virtual tokens change "
        "no weights that they could be merged into",
        lambda s: s.output.merge is None or s.method.type in MERGED_METHODS,
    ),
    Rule(
        f"!has(self.output.merge) || !has(self.output.merge.gguf) || !({_OBJECTIVE} in [{_listed(WITH_HEAD)}])",
        "output.merge.gguf needs a model that writes text: it is not for objectives Reward and Classification",
        lambda s: s.output.merge is None or s.output.merge.gguf is None or type_of(s.objective) not in WITH_HEAD,
    ),
    Rule(
        "!has(self.evaluation) || has(self.dataset.validation) || has(self.dataset.validationFraction) || "
        "((!has(self.evaluation.strategy) || self.evaluation.strategy == 'None') && "
        "!(has(self.evaluation.loadBest) && self.evaluation.loadBest) && !has(self.evaluation.earlyStopping))",
        "evaluation needs rows to evaluate on: set dataset.validation or dataset.validationFraction",
        lambda s: (
            s.evaluation is None
            or s.dataset.validation is not None
            or s.dataset.validation_fraction is not None
            or (
                s.evaluation.strategy in (None, "None")
                and not s.evaluation.load_best
                and s.evaluation.early_stopping is None
            )
        ),
    ),
    Rule(
        f"!has(self.evaluation) || !has(self.evaluation.metric) || self.evaluation.metric == 'Loss' || "
        f"{_OBJECTIVE} == 'Classification' || (self.evaluation.metric == 'Accuracy' && {_OBJECTIVE} == 'Reward')",
        "evaluation.metric Accuracy is only for objectives Classification and Reward, F1 only for Classification",
        lambda s: (
            s.evaluation is None
            or s.evaluation.metric in (None, "Loss")
            or type_of(s.objective) == "Classification"
            or (s.evaluation.metric == "Accuracy" and type_of(s.objective) == "Reward")
        ),
    ),
    Rule(
        f"!has(self.hyperparameters) || !has(self.hyperparameters.neftuneNoiseAlpha) || {_OBJECTIVE} == 'SFT'",
        "hyperparameters.neftuneNoiseAlpha is only for objective SFT",
        lambda s: (
            s.hyperparameters is None or s.hyperparameters.neftune_noise_alpha is None or type_of(s.objective) == "SFT"
        ),
    ),
    *(_format_rule(kind) for kind in FORMATS),
    Rule(
        f"{_OBJECTIVE} != 'KTO' || (has(self.objective.kto) && has(self.objective.kto.loss) && "
        f"self.objective.kto.loss != 'KTO') || {_hyperparameter('batchSize')} >= 2",
        "kto.loss KTO compares the answers of a batch with each other: set hyperparameters.batchSize to 2 or more",
        lambda s: not _is_kto(s) or _value(s, "batchSize") >= 2,
    ),
    _whole_parts("GRPO", "generations", 8, "compares whole groups of answers"),
    _answer_fits("GRPO"),
    *_PPO_RULES,
    _whole_parts("PPO", "miniBatches", 1, "splits its rollouts into equal parts"),
    _answer_fits("PPO"),
    *_FSDP_RULES,
    Rule(
        f"{_OBJECTIVE} == 'SFT' || self.method.type in ['Full', 'LoRA', 'QLoRA']",
        "PrefixTuning, PromptTuning and IA3 are only for objective SFT: use LoRA, QLoRA or Full",
        lambda s: type_of(s.objective) == "SFT" or s.method.type in ("Full", "LoRA", "QLoRA"),
    ),
    Rule(
        f"!({_OBJECTIVE} in [{_listed(COMPARED_WITH_START)}]) || !has(self.method.lora) || "
        "!has(self.method.lora.bias) || self.method.lora.bias == 'None'",
        f"lora.bias is not for {', '.join(COMPARED_WITH_START)}: their reference is the model without its adapter, and "
        "trained bias terms would stay in it",
        lambda s: (
            type_of(s.objective) not in COMPARED_WITH_START or s.method.lora is None or s.method.lora.bias == "None"
        ),
    ),
    Rule(
        "!has(self.hyperparameters) || !has(self.hyperparameters.packing) || !self.hyperparameters.packing || "
        f"({_OBJECTIVE} == 'SFT' && !(self.method.type in ['PrefixTuning', 'PromptTuning']))",
        "hyperparameters.packing is only for objective SFT, and not for PrefixTuning and PromptTuning, which would "
        "put their tokens before the first row alone",
        lambda s: (
            s.hyperparameters is None
            or not s.hyperparameters.packing
            or (type_of(s.objective) == "SFT" and s.method.type not in ("PrefixTuning", "PromptTuning"))
        ),
    ),
    Rule(
        "self.method.type != 'PrefixTuning' || !has(self.hyperparameters) || "
        "!has(self.hyperparameters.gradientCheckpointing) || !self.hyperparameters.gradientCheckpointing",
        "hyperparameters.gradientCheckpointing does not work with PrefixTuning: its keys and values come from no "
        "layer that could compute them again",
        lambda s: (
            s.method.type != "PrefixTuning" or s.hyperparameters is None or not s.hyperparameters.gradient_checkpointing
        ),
    ),
    Rule(
        f"!has(self.model.continueFrom) || self.method.type in [{_listed(CONTINUED_METHODS)}]",
        "model.continueFrom goes on from an adapter of the methods LoRA, QLoRA and IA3: set method.type to its own",
        lambda s: s.model.continue_from is None or s.method.type in CONTINUED_METHODS,
    ),
    Rule(
        "!has(self.model.continueFrom) || (!has(self.method.lora) && !has(self.method.ia3))",
        "model.continueFrom keeps the settings of the adapter it goes on from: remove method.lora and method.ia3",
        lambda s: s.model.continue_from is None or (s.method.lora is None and s.method.ia3 is None),
    ),
)
