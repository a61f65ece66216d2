"""The documents beside the result: run.json for machines, README.md for people. Pure functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tunewright_api.run_config import RECIPE_VERSION, TrainRun
from tunewright_api.run_report import EvaluationResult, RunPlan
from tunewright_trainer.dataset import PreparedData
from tunewright_trainer.inputs import Inputs, SourceFiles
from tunewright_trainer.protocol import ResultEvent

HUB_PREFIX = "hf://"
DATASET_PREFIX = "hf://datasets/"
THIS_FOLDER = '"PATH/TO/THIS/FOLDER"'
"""Stands in the card's code for the result, wherever somebody has put it."""
_OBJECTIVES = {
    "SFT": "supervised fine-tuning",
    "DPO": "direct preference optimization",
    "KTO": "Kahneman-Tversky optimization",
    "Reward": "reward model",
    "GRPO": "group relative policy optimization",
    "PPO": "proximal policy optimization",
    "Classification": "text classification",
}


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
            **_adapter_input(inputs),
            "data": [_data_input(address, found) for address, found in inputs.data.items()],
            "rewardModels": [{"uri": uri, "digest": digest} for uri, digest in inputs.reward_versions.items()],
            "rewardFunctions": [
                {"module": module, "digest": digest} for module, digest in inputs.function_digests.items()
            ],
        },
        "data": {"format": finished.data.format.name, "why": finished.data.format.why},
        "plan": finished.plan.document(),
        **({"outputs": finished.result.outputs} if finished.result.outputs else {}),
        "metrics": metrics(finished),
        "versions": finished.result.versions,
        "startedAt": finished.started_at,
        "endedAt": finished.ended_at,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _data_input(address: str, found: SourceFiles) -> dict[str, Any]:
    document = {"uri": address, "version": found.version, "bytes": found.size_bytes}
    return {**document, "files": [file.name for file in found.files]} if found.source.is_data_set else document


def _adapter_input(inputs: Inputs) -> dict[str, Any]:
    if inputs.adapter is None:
        return {}
    return {"adapter": {"manifestUri": inputs.adapter.manifest_uri, "digest": inputs.adapter.digest}}


def card(finished: Finished) -> str:
    """Return README.md in the form that the Hugging Face Hub reads."""
    run = finished.run
    base = _base_name(finished.inputs)
    adapter = finished.result.kind == "Adapter"
    front = [f"base_model: {json.dumps(base)}"] if run.model.uri.startswith(HUB_PREFIX) else []
    front += _hub_datasets(finished.inputs)
    task = "text-generation" if _predicts_tokens(run) else "text-classification"
    front += [f"library_name: {'peft' if adapter else 'transformers'}", f"pipeline_tag: {task}"]
    front += ["tags:", "- tunewright", f"- {run.objective.type.lower()}"]
    front += [f"- {run.method.lower()}"] if adapter else []
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
            f"({run.method}, {_OBJECTIVES[run.objective.type]}), trained by tunewright{_start(finished.inputs)}.",
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
                f"- `{address}` ({found.size_bytes} bytes, version `{found.version}`)"
                for address, found in finished.inputs.data.items()
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


def _start(inputs: Inputs) -> str:
    """Say which adapter the training went on from."""
    return f" from the adapter of `{inputs.adapter.manifest_uri}` on" if inputs.adapter is not None else ""


def card_on_hub(card: str, repository: str, revision: str | None) -> str:
    """Return a card whose code loads the result from a repository on the Hub."""
    branch = f", revision={json.dumps(revision)}" if revision is not None else ""
    return card.replace(THIS_FOLDER, json.dumps(repository) + branch)


def _hub_datasets(inputs: Inputs) -> list[str]:
    uris = (found.source.uri for found in inputs.data.values())
    names = ("/".join(uri.removeprefix(DATASET_PREFIX).split("/")[:2]) for uri in uris if uri.startswith(HUB_PREFIX))
    unique = list(dict.fromkeys(names))
    return ["datasets:", *(f"- {json.dumps(name)}" for name in unique)] if unique else []


def _result_lines(finished: Finished) -> list[str]:
    lines = []
    evaluation = finished.evaluation
    if evaluation and evaluation.base is not None and evaluation.tuned is not None:
        lines.append(
            f"Loss on the validation rows: **{evaluation.base:.4f}** before, **{evaluation.tuned:.4f}** after."
        )
        after = evaluation.tuned_metrics or {}
        for name, before in (evaluation.base_metrics or {}).items():
            if name in after:
                lines.append(f"{name}: {before:.4f} before, {after[name]:.4f} after.")
    if finished.loss is not None:
        lines.append(f"Training loss of the last step: {finished.loss:.4f}.")
    lines.append(f"{finished.result.steps} steps in {finished.result.train_seconds:.0f} s.")
    return lines


def _predicts_tokens(run: TrainRun) -> bool:
    return run.objective.type not in ("Reward", "Classification")


def _loading(finished: Finished) -> list[str]:
    kind, head = "AutoModelForCausalLM", ""
    if not _predicts_tokens(finished.run):
        kind = "AutoModelForSequenceClassification"
        head = f", num_labels={len(finished.result.outputs or ())}"
    imports = [f"from transformers import {kind}, AutoTokenizer"]
    lines = [f"model = {kind}.from_pretrained({THIS_FOLDER})"]
    if finished.result.kind == "Adapter":
        base = _base_name(finished.inputs)
        on_hub = finished.inputs.model.hub is not None
        imports.insert(0, "from peft import PeftModel")
        lines = [
            f"model = {kind}.from_pretrained({json.dumps(base)}{head})"
            if on_hub
            else f'model = {kind}.from_pretrained("PATH/TO/THE/BASE/MODEL"{head})  # a copy of {base}',
            f"model = PeftModel.from_pretrained(model, {THIS_FOLDER})",
        ]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({THIS_FOLDER})")
    return ["```python", *imports, "", *lines, "```"]


def _base_name(inputs: Inputs) -> str:
    return inputs.model.uri.removeprefix(HUB_PREFIX)
