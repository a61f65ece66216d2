"""Which weights are trained: the method of a FineTuneJob and its settings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tunewright_api.base import Rule, SpecModel
from tunewright_api.v1alpha1.parts import DType

MethodType = Literal["Full", "LoRA", "QLoRA", "PrefixTuning", "PromptTuning", "IA3"]
TargetPreset = Literal["AllLinear", "Attention", "QueryValue"]
ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


class LoRA(SpecModel):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=16, ge=1, le=512, description="Rank of the update.")
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Scale: the update is multiplied by alpha/rank. Default: twice the rank."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Dropout on the adapter's input. Default: 0.05; 0 for objective PPO, which has none."
    )
    targets: TargetPreset | None = Field(
        default=None,
        description="Layers to adapt, resolved per model family. Default: AllLinear.",
    )
    target_modules: list[ModuleName] | None = Field(
        default=None, min_length=1, max_length=64, description="Layers to adapt, by module name."
    )
    modules_to_save: list[ModuleName] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="Further modules that are trained in full and saved with the adapter, such as lm_head.",
    )
    bias: Literal["None", "All", "LoRAOnly"] = Field(
        default="None", description="Bias terms that are trained as well: none, all, or those of adapted layers."
    )
    use_rslora: bool = Field(
        default=False, description="Scale by alpha/sqrt(rank), which keeps high ranks stable (Kalajdzievski 2023)."
    )
    use_dora: bool = Field(
        default=False, description="Train direction and magnitude of weights apart (Liu et al. 2024); slower."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.targets) && has(self.targetModules))",
            "lora.targets and lora.targetModules exclude each other: keep one",
            lambda x: x.targets is None or x.target_modules is None,
        ),
    )


class Quantization(SpecModel):
    """How the frozen base is stored under QLoRA (Dettmers et al. 2023)."""

    bits: Literal[4, 8] = Field(default=4, description="Bits per base weight.")
    type: Literal["NF4", "FP4"] | None = Field(default=None, description="4-bit number format. Default: NF4.")
    double_quant: bool | None = Field(default=None, description="Quantize the 4-bit scales as well. Default: true.")
    compute_dtype: DType = Field(default="Auto", description="Number format of the matrix products.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(has(self.bits) ? self.bits : 4) == 4 || (!has(self.type) && !has(self.doubleQuant))",
            "quantization.type and quantization.doubleQuant are only for bits: 4",
            lambda q: q.bits == 4 or (q.type is None and q.double_quant is None),
        ),
    )


class PrefixTuning(SpecModel):
    """Trained keys and values before every layer's own (Li and Liang 2021)."""

    virtual_tokens: int = Field(default=20, ge=1, le=1024, description="Length of the prefix.")
    projection: bool = Field(
        default=False, description="Learn the prefix through a small network, which trains more steadily."
    )


class PromptTuning(SpecModel):
    """Trained embeddings before the input (Lester et al. 2021)."""

    virtual_tokens: int = Field(default=20, ge=1, le=1024, description="Number of embeddings.")
    init_text: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None, description="Text whose embeddings are the start. Default: random tokens."
    )


class IA3(SpecModel):
    """Trained scales on keys, values and feed-forward inputs (Liu et al. 2022)."""

    target_modules: list[ModuleName] | None = Field(
        default=None, min_length=1, max_length=64, description="Layers to scale. Default: those of the model family."
    )
    feedforward_modules: list[ModuleName] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Those of targetModules whose input is scaled instead of their output. Default: the family's.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.feedforwardModules) || "
            "(has(self.targetModules) && self.feedforwardModules.all(m, m in self.targetModules))",
            "ia3.feedforwardModules must be among ia3.targetModules",
            lambda x: x.feedforward_modules is None or set(x.feedforward_modules) <= set(x.target_modules or ()),
        ),
    )


def _only_with(field: str, kind: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || self.type == '{kind}'",
        f"method.{field} is only for method.type {kind}: remove it or change the type",
        lambda m: getattr(m, _snake(field)) is None or m.type == kind,
    )


def _snake(field: str) -> str:
    return {"prefixTuning": "prefix_tuning", "promptTuning": "prompt_tuning"}.get(field, field)


class Method(SpecModel):
    """Which weights are trained."""

    type: MethodType = Field(
        description="Full trains all weights, LoRA an adapter, QLoRA an adapter on a quantized base; PrefixTuning, "
        "PromptTuning and IA3 train very small adapters."
    )
    lora: LoRA | None = Field(default=None, description="Adapter settings of LoRA and QLoRA.")
    quantization: Quantization | None = Field(
        default=None,
        description="Base storage of QLoRA. Files that bitsandbytes has quantized already are taken as they are; "
        "settings that are not theirs are refused.",
    )
    prefix_tuning: PrefixTuning | None = Field(default=None, description="Settings of PrefixTuning.")
    prompt_tuning: PromptTuning | None = Field(default=None, description="Settings of PromptTuning.")
    ia3: IA3 | None = Field(default=None, description="Settings of IA3.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.type in ['LoRA', 'QLoRA'] || !has(self.lora)",
            "method.lora is only for LoRA and QLoRA: remove it or change method.type",
            lambda m: m.type in ("LoRA", "QLoRA") or m.lora is None,
        ),
        Rule(
            "(self.type == 'QLoRA') == has(self.quantization)",
            "method.quantization belongs to QLoRA: QLoRA needs it, the other methods forbid it",
            lambda m: (m.type == "QLoRA") == (m.quantization is not None),
        ),
        _only_with("prefixTuning", "PrefixTuning"),
        _only_with("promptTuning", "PromptTuning"),
        _only_with("ia3", "IA3"),
    )
