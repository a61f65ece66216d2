"""From the runs of a row to its entry in results.json, and from the entries to the printed table."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from bench.trainer.runs import Numbers
from bench.trainer.table import HEADLINE, PACKING, Row
from tunewright_trainer.protocol import StepEvent, write_event


def timed(run: Numbers) -> float:
    """Return the seconds of all steps but the first, which warms caches up."""
    return float(sum(run["step_seconds"][1:]))


def speed(run: Numbers) -> float:
    """Return the tokens per second of all steps but the first, padding left out."""
    return float(run["tokens"][-1] - run["tokens"][0]) / timed(run)


def compare(row: Row, runs: list[tuple[Numbers, Numbers]]) -> Numbers:
    """Return what results.json says of a row: tunewright's runs against those of the plain script."""
    ours, plain = [one for one, _ in runs], [other for _, other in runs]
    first, second = runs[0]
    return {
        "against": row.against,
        "arguments": {"steps": row.steps, "batch": row.batch, "tokens": row.tokens, "settings": row.settings},
        **ratios([timed(a) / timed(b) for a, b in runs]),
        "train_time_ratio": statistics.median(a["train_seconds"] / b["train_seconds"] for a, b in runs),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=True)),
        "same_tokens": first["tokens"] == second["tokens"],
        "sides": {"tunewright": side(ours), "plain": side(plain)},
        "worker_start_seconds": statistics.median(run["worker_start_seconds"] for run in ours),
        "supervisor_peak_mib": max(run["supervisor_peak_bytes"] for run in ours) / 2**20,
        "step_seconds": {"tunewright": seconds(ours), "plain": seconds(plain)},
    }


def ratios(values: list[float]) -> Numbers:
    """Return the estimate over the pairs: their median, and how far apart they are."""
    return {
        "pairs": len(values),
        "ratio": statistics.median(values),
        "spread": [min(values), max(values)],
        "ratios": values,
    }


def side(runs: list[Numbers]) -> Numbers:
    """Return the numbers of one side."""
    return {
        "step_seconds": statistics.median(timed(run) / (len(run["step_seconds"]) - 1) for run in runs),
        "tokens_per_second": statistics.median(speed(run) for run in runs),
        "train_seconds": statistics.median(run["train_seconds"] for run in runs),
        "peak_mib": max(run["peak_bytes"] for run in runs) / 2**20,
    }


def seconds(runs: list[Numbers]) -> list[list[float]]:
    """Return the time of every step of every run, to the millisecond."""
    return [[round(step, 3) for step in run["step_seconds"]] for run in runs]


def event_cost(count: int = 1000) -> float:
    """Return the seconds that reporting one step takes."""
    event = StepEvent(step=1, epoch=0.1, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=1, tokens_per_second=1.0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for _ in range(count):
            write_event(Path(folder), event)
        return (time.perf_counter() - began) / count


def print_table(rows: dict[str, Numbers], names: Iterable[str]) -> None:
    """Print the named rows and, last, the headline."""
    print(f"\n{'':20}{'pairs':>6}{'step time, ours / plain':>28}{'s/step':>15}{'tokens/s':>17}{'peak MiB':>15}")
    for name in names:
        row = rows[name]
        ours, other = row["sides"].values()
        low, high = row["spread"]
        print(
            f"{name:20}{row['pairs']:6}{row['ratio']:12.3f} ({low:.3f} to {high:.3f})"
            f"{ours['step_seconds']:8.2f}{other['step_seconds']:7.2f}"
            f"{ours['tokens_per_second']:9.1f}{other['tokens_per_second']:8.1f}"
            f"{ours['peak_mib']:9.0f}{other['peak_mib']:6.0f}"
        )


def print_packing(row: Numbers) -> None:
    """Print what packing brings."""
    packed, padded = row["sides"]["packed"], row["sides"]["padded"]
    low, high = row["spread"]
    print(
        f"packing: {packed['tokens_per_second']:.1f} real tokens/s, padding {padded['tokens_per_second']:.1f}: "
        f"{row['ratio']:.2f} times ({low:.2f} to {high:.2f}, {row['pairs']} pairs; at least 2)"
    )


def print_headline(row: Numbers) -> None:
    """Print what supervisor and worker cost."""
    print(f"one event: {row['event_microseconds']:.0f} microseconds")
    print(f"worker starts {row['worker_start_seconds']:.2f} s after the supervisor (limit 1.5)")
    print(f"supervisor peak RSS {row['supervisor_peak_mib']:.0f} MiB (limit 150)")
    print(f"training time, tunewright / plain TRL: {row['train_time_ratio']:.3f}")
    print(f"step time, tunewright / plain TRL: {row['ratio']:.3f} (limit 1.02)")


def print_all(rows: dict[str, Numbers], measured: list[str]) -> None:
    """Print the rows that were measured."""
    if compared := [name for name in measured if name != PACKING]:
        print_table(rows, compared)
    if PACKING in measured:
        print_packing(rows[PACKING])
    if HEADLINE in measured:
        print_headline(rows[HEADLINE])
