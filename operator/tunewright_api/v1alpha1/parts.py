"""The blocks of a FineTuneJob spec that say what is trained, on what, and how."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tunewright_api.base import DataUri, ModelUri, ObjectName, Rule, SpecModel

DType = Literal["Auto", "Float32", "BFloat16", "Float16"]
MethodType = Literal["Full", "LoRA", "QLoRA"]
DataFormat = Literal["Auto", "Text", "PromptCompletion", "Messages", "Alpaca", "ShareGPT"]
TargetPreset = Literal["AllLinear", "Attention", "QueryValue"]
Optimizer = Literal["AdamW", "AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Adafactor"]
Scheduler = Literal["Cosine", "Linear", "Constant", "ConstantWithWarmup"]
ColumnName = Annotated[str, Field(min_length=1, max_length=128)]


class Model(SpecModel):
    """The base model."""

    uri: ModelUri = Field(
        description="Where the model lies: hf://organisation/name, s3://bucket/prefix or pvc://claim/path."
    )
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Branch, tag or commit of an hf:// model. Default: its main branch."
    )
    dtype: DType = Field(
        default="Auto",
        description="Number format of the weights. Auto takes BFloat16 where the device computes in it, else Float32.",
    )
    attention: Literal["Auto", "Eager", "SDPA"] = Field(
        default="Auto", description="Attention kernel. Auto takes the fastest one that is installed."
    )
    chat_template: Annotated[str, Field(min_length=1, max_length=32768)] | None = Field(
        default=None,
        description="Jinja chat template used instead of the tokenizer's own and saved with the result.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.revision) || self.uri.startsWith('hf://')",
            "model.revision is only for hf:// models: an s3:// or pvc:// folder has no revisions",
            lambda m: m.revision is None or m.uri.startswith("hf://"),
        ),
    )


class DataSource(SpecModel):
    """One file of training or validation rows."""

    uri: DataUri = Field(description="A jsonl, json, csv or parquet file: s3://bucket/key or pvc://claim/path.")
    max_samples: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = Field(
        default=None, description="Take only this many rows from the start of the file. Default: all."
    )


class Columns(SpecModel):
    """Names of the columns in the data, where they differ from the format's own names."""

    text: ColumnName | None = Field(default=None, description="Column with the whole text (format Text).")
    prompt: ColumnName | None = Field(default=None, description="Column with the prompt (PromptCompletion).")
    completion: ColumnName | None = Field(default=None, description="Column with the answer (PromptCompletion).")
    messages: ColumnName | None = Field(default=None, description="Column with the chat turns (Messages, ShareGPT).")
    instruction: ColumnName | None = Field(default=None, description="Column with the instruction (Alpaca).")
    input: ColumnName | None = Field(default=None, description="Column with the optional input (Alpaca).")
    output: ColumnName | None = Field(default=None, description="Column with the answer (Alpaca).")


class Dataset(SpecModel):
    """Training and validation rows."""

    train: list[DataSource] = Field(min_length=1, max_length=32, description="Files to train on.")
    validation: list[DataSource] | None = Field(
        default=None, min_length=1, max_length=32, description="Files to evaluate on."
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Share of the training rows held out for evaluation, chosen by `seed`."
    )
    format: DataFormat = Field(
        default="Auto", description="Shape of the rows. Auto looks at the columns and says what it chose."
    )
    columns: Columns | None = Field(default=None, description="Renames, where columns have other names.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.validation) && has(self.validationFraction))",
            "dataset.validation and dataset.validationFraction exclude each other: keep one",
            lambda d: d.validation is None or d.validation_fraction is None,
        ),
    )


class LoRA(SpecModel):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=16, ge=1, le=512, description="Rank of the update.")
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Scale: the update is multiplied by alpha/rank. Default: twice the rank."
    )
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: TargetPreset | None = Field(
        default=None,
        description="Layers to adapt, resolved per model family. Default: AllLinear.",
    )
    target_modules: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        default=None, min_length=1, max_length=64, description="Layers to adapt, by module name."
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


class Method(SpecModel):
    """Which weights are trained."""

    type: MethodType = Field(
        description="Full trains all weights, LoRA an adapter, QLoRA an adapter on a quantized base."
    )
    lora: LoRA | None = Field(default=None, description="Adapter settings of LoRA and QLoRA.")
    quantization: Quantization | None = Field(default=None, description="Base storage of QLoRA.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.type != 'Full' || !has(self.lora)",
            "method.lora is only for LoRA and QLoRA: remove it or change method.type",
            lambda m: m.type != "Full" or m.lora is None,
        ),
        Rule(
            "(self.type == 'QLoRA') == has(self.quantization)",
            "method.quantization belongs to QLoRA: QLoRA needs it, LoRA and Full forbid it",
            lambda m: (m.type == "QLoRA") == (m.quantization is not None),
        ),
    )


class Hyperparameters(SpecModel):
    """Training arguments; every one left out is filled by `tunewright_api.defaults` and shown in status.plan."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        default=None, description="Passes over the training rows. Default: 1, unless maxSteps is given."
    )
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None, description="Number of optimizer steps, instead of epochs."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="Peak learning rate.")
    scheduler: Scheduler | None = Field(default=None, description="Shape of the learning rate over time.")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Share of the steps in which the learning rate rises from zero."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Rows per device in one forward pass (micro-batch)."
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Micro-batches per optimizer step."
    )
    max_sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = Field(
        default=None, description="Tokens per row; longer rows are cut at the end."
    )
    packing: bool | None = Field(
        default=None, description="Put several short rows into one sequence; rows do not see each other."
    )
    optimizer: Optimizer | None = Field(default=None, description="Optimizer.")
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="Weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        default=None, description="Gradients are scaled down to this norm."
    )
    gradient_checkpointing: bool | None = Field(
        default=None, description="Compute activations again in the backward pass to save memory."
    )
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] | None = Field(
        default=None, description="Seed of initialisation, shuffling and the validation split."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "hyperparameters.epochs and hyperparameters.maxSteps exclude each other: keep one",
            lambda h: h.epochs is None or h.max_steps is None,
        ),
    )


class Evaluation(SpecModel):
    """When the model is evaluated on the validation rows. The base model is always evaluated once, before training."""

    strategy: Literal["Epoch", "Steps", "None"] | None = Field(
        default=None, description="Default: Epoch where there are validation rows, else None."
    )
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        default=None, description="Optimizer steps between evaluations (strategy Steps)."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.steps) == (has(self.strategy) && self.strategy == 'Steps')",
            "evaluation.steps belongs to strategy Steps: give both or neither",
            lambda e: (e.steps is not None) == (e.strategy == "Steps"),
        ),
    )


class StorageRef(SpecModel):
    """The S3 service; what is left out comes from the platform's defaults."""

    secret_name: ObjectName | None = Field(
        default=None,
        description="Secret in the same namespace with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
        "(and AWS_SESSION_TOKEN). Left out: the pod's own cloud identity.",
    )
    endpoint: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+/?$", max_length=512)] | None = Field(
        default=None, description="URL of the S3 service. Default: AWS."
    )
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=64)] | None = Field(
        default=None, description="Region. Default: us-east-1."
    )
    path_style: bool | None = Field(
        default=None, description="Bucket in the path, not in the host name. Default: true with an endpoint."
    )
