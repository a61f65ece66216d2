"""The blocks of a FineTuneJob spec that say what is trained, on which rows, and with which training arguments."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tunewright_api.base import (
    AdapterMergeName,
    ArtifactUri,
    DataUri,
    FineTuneJobName,
    ModelUri,
    ObjectName,
    Rule,
    SpecModel,
    SplitName,
)
from tunewright_api.extra import Extra

DType = Literal["Auto", "Float32", "BFloat16", "Float16"]
DataFormat = Literal[
    "Auto", "Text", "PromptCompletion", "Messages", "Alpaca", "ShareGPT", "Preference", "UnpairedPreference", "Prompts",
    "Labelled",
]  # fmt: skip
DEFAULT_SPLIT = "train"
DEFAULT_BATCH_SIZE = 4
DEFAULT_GRADIENT_ACCUMULATION_STEPS = 4
DEFAULT_MAX_SEQUENCE_LENGTH = 1024
"""Here rather than in the table of defaults, because rules count on them."""
Optimizer = Literal["AdamW", "AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Adafactor", "Lion", "SGD"]
Scheduler = Literal[
    "Cosine", "CosineWithRestarts", "Linear", "Polynomial", "InverseSqrt", "Constant", "ConstantWithWarmup"
]  # fmt: skip
Metric = Literal["Loss", "Accuracy", "F1"]
ColumnName = Annotated[str, Field(min_length=1, max_length=128)]


class ArtifactRef(SpecModel):
    """A published result of another run: of a FineTuneJob by name, or by address."""

    fine_tune_job: FineTuneJobName | None = Field(
        default=None,
        description="Name of a FineTuneJob in the same namespace. This one waits until it is complete, and fails when "
        "it fails.",
    )
    uri: ArtifactUri | None = Field(
        default=None,
        description="Address of a run's folder, of its manifest.json, of its adapter, or of an output folder (its "
        "newest run), reached with this FineTuneJob's storage settings.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.fineTuneJob) != has(self.uri)",
            "a reference names a result by exactly one of fineTuneJob and uri",
            lambda r: (r.fine_tune_job is None) != (r.uri is None),
        ),
    )


class Model(SpecModel):
    """The base model, and the adapter to go on from."""

    uri: ModelUri | None = Field(
        default=None,
        description="Where the model lies: hf://organisation/name, s3://bucket/prefix or pvc://claim/path.",
    )
    from_merge: AdapterMergeName | None = Field(
        default=None,
        description="In place of uri: name of an AdapterMerge in the same namespace, whose merged model is trained. "
        "This one waits until it is complete, and fails when it fails.",
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
    continue_from: ArtifactRef | None = Field(
        default=None,
        description="Adapter of this base model that training goes on from, in place of a new one. Its settings (rank, "
        "layers, ...) stay as they are; DPO and KTO take it as the reference.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.uri) != has(self.fromMerge)",
            "model names its weights by exactly one of uri and fromMerge",
            lambda m: (m.uri is None) != (m.from_merge is None),
        ),
        Rule(
            "!has(self.revision) || (has(self.uri) && self.uri.startsWith('hf://'))",
            "model.revision is only for hf:// models: an s3:// or pvc:// folder has no revisions",
            lambda m: m.revision is None or (m.uri is not None and m.uri.startswith("hf://")),
        ),
    )


class RunModel(Model):
    """The same in a run document: where the model lies is known."""

    uri: ModelUri
    from_merge: None = None


class DataSource(SpecModel):
    """One file of training or validation rows, or one split of a data set on the Hub."""

    uri: DataUri = Field(
        description="A jsonl, json, csv or parquet file: s3://bucket/key, pvc://claim/path or a file of a data set on "
        "the Hub, hf://datasets/organisation/name/path; or a data set as a whole, hf://datasets/organisation/name."
    )
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Branch, tag or commit of an hf:// data set. Default: its main branch."
    )
    split: SplitName | None = Field(
        default=None,
        description="Split of a data set that is named as a whole; its files are found as the datasets library does. "
        "Default: train.",
    )
    max_samples: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = Field(
        default=None, description="Take only this many rows from the start of the file or split. Default: all."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="How often each row is used per epoch: 2 takes every row twice, 0.5 a random half of them.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.revision) || self.uri.startsWith('hf://')",
            "revision of a data source is only for hf://datasets/...: an s3:// or pvc:// file has no revisions",
            lambda s: s.revision is None or s.uri.startswith("hf://"),
        ),
        Rule(
            "!has(self.split) || self.uri.matches('^hf://datasets/[^/]+/[^/]+$')",
            "split of a data source is only for a data set as a whole, hf://datasets/organisation/name: a file has no "
            "splits",
            lambda s: s.split is None or s.is_data_set,
        ),
    )

    @property
    def is_data_set(self) -> bool:
        """Tell whether a whole data set on the Hub is named, of which one split is read."""
        return re.fullmatch("hf://datasets/[^/]+/[^/]+", self.uri) is not None

    @property
    def address(self) -> str:
        """URI, revision and split: what tells the rows of one source from another's."""
        uri = self.uri if self.revision is None else f"{self.uri}@{self.revision}"
        return f"{uri}#{self.split or DEFAULT_SPLIT}" if self.is_data_set else uri


class Columns(SpecModel):
    """Names of the columns in the data, where they differ from the format's own names."""

    text: ColumnName | None = Field(default=None, description="Column with the whole text (Text, Labelled).")
    prompt: ColumnName | None = Field(
        default=None, description="Column with the prompt (PromptCompletion, Preference, UnpairedPreference, Prompts)."
    )
    completion: ColumnName | None = Field(
        default=None, description="Column with the answer (PromptCompletion, UnpairedPreference)."
    )
    messages: ColumnName | None = Field(default=None, description="Column with the chat turns (Messages, ShareGPT).")
    tools: ColumnName | None = Field(default=None, description="Column with the tools' schemas (Messages).")
    instruction: ColumnName | None = Field(default=None, description="Column with the instruction (Alpaca).")
    input: ColumnName | None = Field(default=None, description="Column with the optional input (Alpaca).")
    output: ColumnName | None = Field(default=None, description="Column with the answer (Alpaca).")
    chosen: ColumnName | None = Field(default=None, description="Column with the better answer (Preference).")
    rejected: ColumnName | None = Field(default=None, description="Column with the worse answer (Preference).")
    label: ColumnName | None = Field(
        default=None, description="Column with the verdict (UnpairedPreference: true or false) or the label (Labelled)."
    )


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
    prompt_template: Annotated[str, Field(min_length=1, max_length=8192)] | None = Field(
        default=None,
        description="Plain text of the prompt, with columns in braces: 'Question: {question} Answer:'. For rows of "
        "format PromptCompletion and Alpaca; no chat template is applied then.",
    )
    response_template: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        default=None,
        description="Text behind which the answer of a plain-text row begins, such as '### Response:'. For rows of "
        "format Text; only the answer is learned then.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.validation) && has(self.validationFraction))",
            "dataset.validation and dataset.validationFraction exclude each other: keep one",
            lambda d: d.validation is None or d.validation_fraction is None,
        ),
        Rule(
            "!has(self.validationFraction) || self.train.all(t, !has(t.weight) || t.weight <= 1.0)",
            "dataset.validationFraction does not go with weights above 1: copies of a row would be trained on and "
            "evaluated on; give dataset.validation instead",
            lambda d: d.validation_fraction is None or all(t.weight <= 1 for t in d.train),
        ),
        Rule(
            "!(has(self.promptTemplate) && has(self.responseTemplate))",
            "dataset.promptTemplate and dataset.responseTemplate exclude each other: keep one",
            lambda d: d.prompt_template is None or d.response_template is None,
        ),
        Rule(
            "!has(self.promptTemplate) || !has(self.format) || self.format in ['Auto', 'PromptCompletion', 'Alpaca']",
            "dataset.promptTemplate is only for rows of format PromptCompletion and Alpaca",
            lambda d: d.prompt_template is None or d.format in ("Auto", "PromptCompletion", "Alpaca"),
        ),
        Rule(
            "!has(self.responseTemplate) || !has(self.format) || self.format in ['Auto', 'Text']",
            "dataset.responseTemplate is only for rows of format Text",
            lambda d: d.response_template is None or d.format in ("Auto", "Text"),
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
    scheduler: Scheduler | None = Field(
        default=None,
        description="Shape of the learning rate over time. CosineWithRestarts starts anew four times.",
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Share of the steps in which the learning rate rises from zero."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Rows that each process takes in one forward pass (micro-batch)."
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Micro-batches of each process per optimizer step."
    )
    max_sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = Field(
        default=None, description="Tokens per row; longer rows are cut at the end."
    )
    packing: bool | None = Field(
        default=None, description="Put several short rows into one sequence; rows do not see each other."
    )
    optimizer: Optimizer | None = Field(
        default=None, description="Optimizer. Lion wants a learning rate 3 to 10 times lower, SGD one far higher."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="Weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        default=None, description="Gradients are scaled down to this norm."
    )
    gradient_checkpointing: bool | None = Field(
        default=None, description="Compute activations again in the backward pass to save memory."
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None,
        description="Noise on the embeddings while training (Jain et al. 2023), 5 to 15 are usual; objective SFT only.",
    )
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] | None = Field(
        default=None, description="Seed of initialisation, shuffling and the validation split."
    )
    extra: Extra | None = Field(
        default=None,
        description="Further TrainingArguments of transformers by their own names, such as adam_beta2: 0.95; what has "
        "a field of its own is refused with the field's name.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "hyperparameters.epochs and hyperparameters.maxSteps exclude each other: keep one",
            lambda h: h.epochs is None or h.max_steps is None,
        ),
    )


class EarlyStopping(SpecModel):
    """End the training when evaluations stop getting better."""

    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=3, description="Evaluations in a row without an improvement after which training ends."
    )
    min_delta: Annotated[float, Field(ge=0, le=1_000_000)] = Field(
        default=0.0, description="What counts as an improvement: the metric is better by more than this."
    )


def _selects(evaluation: Evaluation) -> bool:
    return bool(evaluation.load_best) or evaluation.early_stopping is not None


class Evaluation(SpecModel):
    """When the model is evaluated on the validation rows. The base model is always evaluated once, before training."""

    strategy: Literal["Epoch", "Steps", "None"] | None = Field(
        default=None, description="Default: Epoch where there are validation rows, else None."
    )
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        default=None, description="Optimizer steps between evaluations (strategy Steps)."
    )
    load_best: bool | None = Field(
        default=None,
        description="The result is the model of the best evaluation, not of the last step. Default: true with "
        "earlyStopping, else false.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="End the training when evaluations stop getting better; the run is Complete."
    )
    metric: Metric | None = Field(
        default=None,
        description="What loadBest and earlyStopping go by: Loss (default), Accuracy (Classification, Reward) or F1 "
        "(Classification).",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.steps) == (has(self.strategy) && self.strategy == 'Steps')",
            "evaluation.steps belongs to strategy Steps: give both or neither",
            lambda e: (e.steps is not None) == (e.strategy == "Steps"),
        ),
        Rule(
            "!(has(self.strategy) && self.strategy == 'None') || "
            "(!(has(self.loadBest) && self.loadBest) && !has(self.earlyStopping))",
            "evaluation.loadBest and evaluation.earlyStopping need evaluations while training: use strategy Epoch or "
            "Steps",
            lambda e: e.strategy != "None" or not _selects(e),
        ),
        Rule(
            "!has(self.metric) || (has(self.loadBest) && self.loadBest) || has(self.earlyStopping)",
            "evaluation.metric is what loadBest and earlyStopping go by: set one of them",
            lambda e: e.metric is None or _selects(e),
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


class HubRef(SpecModel):
    """The Hugging Face Hub or a server with its API; what is left out comes from the platform's defaults."""

    secret_name: ObjectName | None = Field(
        default=None,
        description="Secret in the same namespace with an access token under the key `token`: for private and gated "
        "models and data sets, and for output.hub. Left out: what is public.",
    )
    endpoint: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+/?$", max_length=512)] | None = Field(
        default=None, description="URL of the hub. Default: https://huggingface.co."
    )
