"""Progress of a run as people see it: a frame with a bar and a loss curve on a terminal, else one line per change."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunewright_api.run_report import EvaluationResult, MergeVerification, Progress, PublishedOutput

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(history: Sequence[tuple[int, float]], width: int = 40) -> str:
    """Draw the losses of (step, loss) points, thinned out to `width` characters; the lowest loss is the lowest bar."""
    if not history:
        return ""
    count = min(width, len(history))
    losses = [history[round(i * (len(history) - 1) / max(1, count - 1))][1] for i in range(count)]
    low, high = min(losses), max(losses)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((loss - low) * scale)] for loss in losses)


def summary(progress: Progress) -> str:
    """Return the numbers of a run in one line."""
    parts: list[str] = [progress.stage]
    if progress.total_steps:
        parts.append(f"step {progress.step}/{progress.total_steps}")
    elif progress.percent:
        parts.append(f"{progress.percent:.0f} %")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.eval_loss is not None:
        parts.append(f"validation loss {progress.eval_loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.eta_seconds is not None and progress.stage != "Finished":
        parts.append(f"{timedelta(seconds=progress.eta_seconds)} left")
    return "  ".join(parts)


def frame(title: str, progress: Progress | None, notes: Sequence[str]) -> RenderableType:
    """Return the live picture: title, bar, numbers, loss curve, notes."""
    rows: list[RenderableType] = [Text(title, style="bold")]
    if progress is not None:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=100, completed=progress.percent, width=32), f"{progress.percent:.0f} %")
        rows += [bar, Text(summary(progress))]
        if len(progress.loss_history) > 1:
            first, last = progress.loss_history[0][1], progress.loss_history[-1][1]
            rows.append(Text(f"{sparkline(progress.loss_history)}  loss {first:.3f} to {last:.3f}"))
        if progress.message:
            rows.append(Text(progress.message, style="dim"))
    rows += [Text(note, style="yellow") for note in notes]
    return Group(*rows)


def result_lines(output: PublishedOutput | None, evaluation: EvaluationResult | None) -> list[str]:
    """Return what a finished run has to show, one `name  value` per line."""
    lines = []
    if output is not None:
        lines += [
            f"result           {output.uri}",
            f"manifest         {output.manifest_uri}",
            f"digest           {output.digest}",
            f"size             {output.size_bytes / 1e6:,.1f} MB",
        ]
        if output.merged_uri is not None:
            lines.append(f"merged           {output.merged_uri}")
        lines += [f"gguf             {uri}" for uri in output.gguf_uris or ()]
        if output.hub_url is not None:
            lines.append(f"hub              {output.hub_url}")
    if evaluation is not None and evaluation.base is not None and evaluation.tuned is not None:
        lines.append(f"validation loss  {evaluation.base:.4f} before, {evaluation.tuned:.4f} after")
    return lines


def verification_lines(found: MergeVerification | None) -> list[str]:
    """Return what was proved of a merge, one `name  value` per line."""
    if found is None:
        return []
    lines = [
        f"verified         {found.adapter_tensors} tensors of the adapter used, {found.changed_tensors} of the model "
        f"changed, {found.copied_tensors} copied byte for byte"
    ]
    if found.max_divergence is not None and found.allowed_divergence is not None:
        lines.append(
            f"logits           {found.max_divergence:.3g} from base with adapter on {found.prompts} prompts (allowed "
            f"{found.allowed_divergence:.3g}); the adapter moves them by {found.effect or 0:.3g}"
        )
    lines += [f"note             {note}" for note in found.notes or ()]
    if found.vllm is not None:
        lines += [f"vllm             {line}" for line in found.vllm or ["can serve the adapters as they are"]]
    return lines
