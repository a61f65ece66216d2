"""The documents beside a merged model: run.json for machines, README.md for people. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunewright_api.merge_run import MERGE_RECIPE_VERSION, MergeRun
from tunewright_api.run_report import MergePlan, MergeVerification
from tunewright_trainer.documents import HUB_PREFIX, THIS_FOLDER
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.inputs import AdapterInput, TrainedOn


@dataclass(frozen=True)
class FinishedMerge:
    """A merge that passed all checks."""

    run: MergeRun
    run_key: str
    adapters: Sequence[AdapterInput]
    base: TrainedOn | None
    """Uri and version of the base; None: a combination of adapters that do not say."""
    plan: MergePlan
    verification: MergeVerification
    started_at: str
    ended_at: str
    quantization: BaseQuantization | None = None
    """How the base of all adapters was quantized in training, where it is known."""
    outputs: Sequence[str] | None = None
    gguf_files: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def metrics(finished: FinishedMerge) -> dict[str, Any]:
    """Return what the manifest carries besides the verification."""
    return {"merge": finished.plan.document()}


def run_json(finished: FinishedMerge) -> str:
    """Return run.json: what was asked for, what went in, what came out."""
    base, quantization = finished.base, finished.quantization
    given = (
        {"bits": quantization.bits, "type": quantization.type, "doubleQuant": quantization.double_quant}
        if quantization is not None
        else None
    )
    document = {
        "version": 1,
        "runKey": finished.run_key,
        "recipeVersion": MERGE_RECIPE_VERSION,
        "run": finished.run.document(),
        "inputs": {
            **({"model": {"uri": base.uri, "version": base.version}} if base is not None else {}),
            "adapters": [
                {"uri": a.place, "version": a.version, "weight": a.weight, "base": a.base.uri if a.base else None}
                for a in finished.adapters
            ],
        },
        **({"quantization": given} if given else {}),
        **({"outputs": list(finished.outputs)} if finished.outputs else {}),
        "plan": finished.plan.document(),
        "verification": finished.verification.document(),
        "versions": dict(finished.versions),
        "startedAt": finished.started_at,
        "endedAt": finished.ended_at,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def card(finished: FinishedMerge) -> str:
    """Return README.md in the form that the Hugging Face Hub reads."""
    run, base = finished.run, finished.base
    what = "An adapter, combined" if run.adapter_only else "A model, merged"
    front = [f"base_model: {json.dumps(_name(base))}"] if base is not None and base.uri.startswith(HUB_PREFIX) else []
    front += [f"library_name: {'peft' if run.adapter_only else 'transformers'}", f"pipeline_tag: {_task(finished)}"]
    front += ["tags:", "- tunewright", "- merge"]
    into = f" into `{_name(base)}`" if base is not None and not run.adapter_only else ""
    source = f"from {len(finished.adapters)} adapters" if len(finished.adapters) > 1 else "from an adapter"
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {run.name}",
            "",
            f"{what} {source}{into} by tunewright.",
            "",
            "## Adapters",
            "",
            "| adapter | version | weight |",
            "|---|---|---|",
            *[f"| `{a.place}` | `{a.version}` | {a.weight:g} |" for a in finished.adapters],
            "",
            *_how(finished),
            "",
            "## Verification",
            "",
            *_verification_lines(finished),
            "",
            "## Load it",
            "",
            *_loading(finished),
            "",
            f"Run key `{finished.run_key}`; run.json has everything else.",
            "",
        ]
    )


def _name(base: TrainedOn | None) -> str:
    return base.uri.removeprefix(HUB_PREFIX) if base is not None else "the base model"


def _task(finished: FinishedMerge) -> str:
    return "text-classification" if _reads(finished) else "text-generation"


def _reads(finished: FinishedMerge) -> bool:
    return finished.adapters[0].config.get("task_type") == "SEQ_CLS"


def _how(finished: FinishedMerge) -> list[str]:
    run, lines = finished.run, []
    if run.combination is not None:
        settings = {k: v for k, v in run.combination.document().items() if k != "type"}
        said = f" ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else ""
        lines.append(f"Combined by {run.combination.type}{said}.")
    if finished.base is not None and finished.base.version is not None:
        lines.append(f"Base `{_name(finished.base)}` at `{finished.base.version}`.")
    if run.quantized_base == "Dequantized":
        lines.append("Merged into what the base is after quantization, as it was in training.")
    return lines


def _verification_lines(finished: FinishedMerge) -> list[str]:
    found = finished.verification
    if finished.run.adapter_only:
        return [f"{found.adapter_tensors} tensors, all of them finite."]
    lines = [
        f"- {found.adapter_tensors} tensors of the adapter, all of them used; {found.changed_tensors} tensors of the "
        f"model changed, {found.copied_tensors} are the base's, byte for byte.",
    ]
    if found.smallest_change is not None:
        lines.append(
            f"- Norms of the changes: {found.smallest_change:.3g} to {found.largest_change:.3g} of their tensors'."
        )
    if found.max_divergence is not None:
        lines.append(
            f"- Logits of {found.prompts} prompts: at most {found.max_divergence:.3g} from base with adapter "
            f"(allowed {found.allowed_divergence:.3g}); the adapter moves them by up to {found.effect:.3g}."
        )
    lines += [f"- {note}" for note in found.notes or ()]
    if found.vllm is not None:
        lines += [f"- vLLM and the adapters: {line}" for line in found.vllm or ["it can serve them as they are"]]
    return lines


def _loading(finished: FinishedMerge) -> list[str]:
    kind = "AutoModelForSequenceClassification" if _reads(finished) else "AutoModelForCausalLM"
    imports = [f"from transformers import {kind}, AutoTokenizer"]
    lines = [f"model = {kind}.from_pretrained({THIS_FOLDER})"]
    if finished.run.adapter_only:
        imports.insert(0, "from peft import PeftModel")
        base = finished.base
        place = (
            json.dumps(_name(base)) if base is not None and base.uri.startswith(HUB_PREFIX) else '"PATH/TO/THE/BASE"'
        )
        lines = [
            f"model = {kind}.from_pretrained({place})",
            f"model = PeftModel.from_pretrained(model, {THIS_FOLDER})",
        ]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({THIS_FOLDER})")
    return ["```python", *imports, "", *lines, "```"]
