"""The documents beside the result: run.json for machines, README.md for people. Pure functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tunewright_api.run_config import RECIPE_VERSION, TrainRun
from tunewright_api.run_report import EvaluationResult, RunPlan
from tunewright_trainer.dataset import PreparedData
from tunewright_trainer.inputs import Inputs
from tunewright_trainer.protocol import ResultEvent

HUB_PREFIX = "hf://"


@dataclass(frozen=True)
class Finished:
    """A run whose result is complete on disk."""

    run: TrainRun
    run_key: str
    inputs: Inputs
    data: PreparedData
    plan: RunPlan
    evaluation: EvaluationResult | None
    loss: float | None
    result: ResultEvent
    started_at: str
    ended_at: str


def metrics(finished: Finished) -> dict[str, Any]:
    """Return the numbers that the manifest carries."""
    evaluation = finished.evaluation
    result = finished.result
    given = {
        "loss": result.train_loss if result.train_loss is not None else finished.loss,
        "steps": result.steps,
        "trainSeconds": result.train_seconds,
        "reloadMaxDifference": result.reload_max_difference,
        "peakMemoryBytes": result.peak_memory_bytes,
        "evaluation": evaluation.document() if evaluation else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def run_json(finished: Finished) -> str:
    """Return run.json: what was asked for, what went in, what came out."""
    inputs = finished.inputs
    document = {
        "version": 1,
        "runKey": finished.run_key,
        "recipeVersion": RECIPE_VERSION,
        "run": finished.run.document(),
        "inputs": {
            "model": {"uri": inputs.model.uri, "version": inputs.model.version},
            "data": [
                {"uri": uri, "version": file.version, "bytes": file.size_bytes} for uri, file in inputs.data.items()
            ],
        },
        "data": {"format": finished.data.format.name, "why": finished.data.format.why},
        "plan": finished.plan.document(),
        "metrics": metrics(finished),
        "versions": finished.result.versions,
        "startedAt": finished.started_at,
        "endedAt": finished.ended_at,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def card(finished: Finished) -> str:
    """Return README.md in the form that the Hugging Face Hub reads."""
    run = finished.run
    base = _base_name(finished.inputs)
    adapter = finished.result.kind == "Adapter"
    front = [f"base_model: {json.dumps(base)}"] if run.model.uri.startswith(HUB_PREFIX) else []
    front += [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    front += ["tags:", "- tunewright", "- sft", *([f"- {run.method.lower()}"] if adapter else [])]
    hyperparameters = "\n".join(f"| {name} | {value} |" for name, value in run.hyperparameters.document().items())
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {run.name}",
            "",
            f"{'An adapter for' if adapter else 'A fine-tuned copy of'} `{base}` "
            f"({run.method}, supervised fine-tuning), trained by tunewright.",
            "",
            "## Result",
            "",
            *_result_lines(finished),
            "",
            "## Load it",
            "",
            *_loading(finished),
            "",
            "## Data",
            "",
            *[
                f"- `{uri}` ({file.size_bytes} bytes, version `{file.version}`)"
                for uri, file in finished.inputs.data.items()
            ],
            "",
            f"{finished.plan.train_rows} rows to train on, {finished.plan.validation_rows or 0} to evaluate on, "
            f"format {finished.data.format.name}.",
            "",
            "## Training arguments",
            "",
            "| argument | value |",
            "|---|---|",
            *([f"| {name} | {value} |" for name, value in run.lora.document().items()] if run.lora else []),
            hyperparameters,
            "",
            f"Run key `{finished.run_key}`; run.json has everything else.",
            "",
        ]
    )


def _result_lines(finished: Finished) -> list[str]:
    lines = []
    evaluation = finished.evaluation
    if evaluation and evaluation.base is not None and evaluation.tuned is not None:
        lines.append(
            f"Loss on the validation rows: **{evaluation.base:.4f}** before, **{evaluation.tuned:.4f}** after."
        )
    if finished.loss is not None:
        lines.append(f"Training loss of the last step: {finished.loss:.4f}.")
    lines.append(f"{finished.result.steps} steps in {finished.result.train_seconds:.0f} s.")
    return lines


def _loading(finished: Finished) -> list[str]:
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines = ['model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")']
    if finished.result.kind == "Adapter":
        base = _base_name(finished.inputs)
        on_hub = finished.inputs.model.hub is not None
        imports.insert(0, "from peft import PeftModel")
        lines = [
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})"
            if on_hub
            else f'model = AutoModelForCausalLM.from_pretrained("PATH/TO/THE/BASE/MODEL")  # a copy of {base}',
            'model = PeftModel.from_pretrained(model, "PATH/TO/THIS/FOLDER")',
        ]
    lines.append('tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")')
    return ["```python", *imports, "", *lines, "```"]


def _base_name(inputs: Inputs) -> str:
    return inputs.model.uri.removeprefix(HUB_PREFIX)
