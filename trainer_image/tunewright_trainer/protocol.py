"""What the supervisor and the worker say to each other: files in the work folder, nothing else.

    work/task.json      supervisor -> worker, written once by rename: model and data are there, begin
    work/events.jsonl   worker -> supervisor, appended: one event a line; of several processes the first one of the
                        whole run says all of it, the others only why they give up
    work/output/        worker -> supervisor: the files to publish, complete when the `result` event is there

Files rather than pipes: an append never waits for a reader, so reporting cannot slow a training step down, and
what a killed worker had said is still there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

from tunewright_api.run_config import TrainRun
from tunewright_api.run_report import Finite

TASK_FILE = "task.json"
EVENTS_FILE = "events.jsonl"
OUTPUT_FOLDER = "output"

REWARD_OUTPUTS = ("reward",)
"""Names of a reward model's outputs."""

RowFormat = Literal[
    "Text", "PromptCompletion", "PlainCompletion", "Messages", "Preference", "UnpairedPreference", "Prompts", "Labelled"
]  # fmt: skip
"""What rows look like after the supervisor normalised them.

Text                 {"text"}
PromptCompletion     {"prompt", "completion"}, both strings; Alpaca becomes this
PlainCompletion      the same, to be left as plain text even where the model has a chat template
Messages             {"messages": [{"role", "content"}]} and, where turns call tools, "tools"; ShareGPT becomes this
Preference           {"prompt", "chosen", "rejected"}: strings, or turns (the answers one assistant turn each)
UnpairedPreference   {"prompt", "completion", "label"}: likewise, label true for a good answer
Prompts              {"prompt", "columns"}: a string or turns, and all further columns as JSON in a string
Labelled             {"text", "label"}, both strings
"""


class _Message(BaseModel):
    # NaN stays NaN on the way: a diverged loss must be reportable.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        ser_json_inf_nan="constants",
    )


class RewardModelFolder(_Message):
    """A reward model on disk: an adapter with its head and the base below it, or a whole model."""

    uri: str
    """Where it came from, for messages."""
    path: Path
    is_adapter: bool
    base_path: Path | None = None
    """Base of an adapter; None: the base model of the task itself."""


class WorkerTask(_Message):
    """Everything is on local disk; the worker needs no network."""

    run: TrainRun
    model_path: Path
    adapter_path: Path | None = None
    """The adapter to go on from (model.continueFrom); None starts from the base model."""
    adapter_outputs: list[str] | None = None
    """Names of the outputs of that adapter's head, in their order; None: it has none."""
    train_path: Path
    """Checked and normalised rows, jsonl."""
    validation_path: Path | None = None
    row_format: RowFormat
    output_path: Path
    reward_models: list[RewardModelFolder] = Field(default_factory=list)
    """One for each reward of type Model, in their order."""
    run_key: str = ""
    """Equal in all pods of a run, unless their inputs differ."""


class StageEvent(_Message):
    """The worker entered a stage, or is further on in one."""

    event: Literal["stage"] = "stage"
    stage: Literal["Loading", "Training", "Evaluating", "Verifying"]
    message: str | None = None
    percent: float | None = Field(default=None, description="Share of what the message names.")


class PlanEvent(_Message):
    """Known once model and data are loaded."""

    event: Literal["plan"] = "plan"
    total_steps: int
    dtype: str
    trainable_parameters: int
    total_parameters: int
    target_modules: list[str] | None = None
    train_rows: int
    dropped_rows: int = 0
    cut_rows: int = 0
    parallelism: str | None = None
    """DDP or FSDP, and why; None for a run in one process."""


class StepEvent(_Message):
    """One optimizer step ended. `loss` and what follows are there on logged steps."""

    event: Literal["step"] = "step"
    step: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = Field(default=None, description="Tokens seen since the start of training.")
    tokens_per_second: float | None = None
    metrics: dict[str, float] | None = Field(
        default=None, description="What the recipe measures besides: rewards, margins, accuracy."
    )
    details: dict[str, float] | None = Field(default=None, description="Metrics that few people look at.")


class EvaluationEvent(_Message):
    """One evaluation ended; `step` 0 is the base model."""

    event: Literal["evaluation"] = "evaluation"
    step: int
    loss: float
    metrics: dict[str, float] | None = None
    details: dict[str, float] | None = Field(default=None, description="Metrics that few people look at.")


class EarlyStopEvent(_Message):
    """Training ended before its last step because evaluations got no better."""

    event: Literal["earlyStop"] = "earlyStop"
    step: int
    message: str


class BestEvent(_Message):
    """The result has the weights of this step's evaluation, not of the last step."""

    event: Literal["best"] = "best"
    step: int
    loss: float
    metrics: dict[str, float] | None = None


class ResultEvent(_Message):
    """The files in the output folder are complete and were loaded again with equal logits."""

    event: Literal["result"] = "result"
    kind: Literal["Adapter", "Model"]
    root: Literal["adapter", "model"]
    """Folder below `output_path` that from_pretrained loads."""
    steps: int
    train_loss: Finite | None = None
    outputs: list[str] | None = None
    """Names of the outputs of a classification head, in order; None: a language model."""
    reload_max_difference: Finite
    """Largest absolute difference of logits between the trained model and the one loaded again from the files."""
    train_seconds: Finite
    peak_memory_bytes: int
    versions: dict[str, str]


class ErrorEvent(_Message):
    """The worker gives up; it exits with the same code."""

    event: Literal["error"] = "error"
    exit_code: int
    reason: str
    message: str


Event = Annotated[
    StageEvent | PlanEvent | StepEvent | EvaluationEvent | EarlyStopEvent | BestEvent | ResultEvent | ErrorEvent,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def write_task(work: Path, task: WorkerTask) -> None:
    """Hand the task over; the rename makes it visible whole or not at all."""
    temporary = work / f"{TASK_FILE}.tmp"
    temporary.write_text(task.model_dump_json(by_alias=True, exclude_none=True))
    temporary.rename(work / TASK_FILE)


def read_task(work: Path) -> WorkerTask | None:
    """Return the task, or None while it is not there yet."""
    path = work / TASK_FILE
    if not path.exists():
        return None
    # A local run's paths passed their check when the spec was parsed.
    return WorkerTask.model_validate_json(path.read_text(), context={"local": True})


def write_event(work: Path, event: BaseModel) -> None:
    """Append one event in a single unbuffered write, so that lines of several processes never mix."""
    line = event.model_dump_json(by_alias=True, exclude_none=True) + "\n"
    with (work / EVENTS_FILE).open("ab", buffering=0) as file:
        file.write(line.encode())


def parse_event(line: str) -> Event:
    """Parse one line of the events file."""
    document: Any = json.loads(line)
    return _EVENT.validate_python(document)
