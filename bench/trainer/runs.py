"""Runs of either side, each in processes of its own on a core of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.trainer.table import Row
from tunewright_trainer.protocol import ResultEvent, StepEvent, parse_event

ROOT = Path(__file__).resolve().parents[2]
EVENTS = "work/events.jsonl"
Numbers = dict[str, Any]
Run = Callable[[Path, int], Numbers]
"""A run in an empty folder, on a core."""


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    model: Path
    dtype: str


def pairs(count: int, first: Callable[[Path], Run], second: Callable[[Path], Run]) -> Iterator[tuple[Numbers, Numbers]]:
    """Run two sides at the same time, pair after pair; the next pair swaps the cores.

    Args:
        count: Number of pairs.
        first: One side, given the folder of the pair.
        second: The other one.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            work = Path(folder)
            one = pool.submit(first(work), work / "first", cores[0])
            other = pool.submit(second(work), work / "second", cores[1])
            yield one.result(), other.result()
        cores.reverse()


def ours(row: Row, setting: Setting, hyperparameters: dict[str, Any] | None = None) -> Run:
    """Return a training through supervisor and worker."""

    def run(folder: Path, core: int) -> Numbers:
        (folder / "work").mkdir(parents=True)
        spec = spec_of(row, setting, folder / "published", hyperparameters or {})
        head = {"apiVersion": "tunewright.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}}
        (folder / "job.json").write_text(json.dumps({**head, "spec": spec}))
        module = [sys.executable, "-m", "bench.trainer.supervised", str(folder / "job.json"), str(folder / "work")]
        numbers = last_line(execute([*on_core(core), *module], {}))
        return {**numbers, **numbers_of(folder / EVENTS)}

    return run


def spec_of(row: Row, setting: Setting, output: Path, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of a row."""
    objective: dict[str, Any] = {"type": row.objective}
    if row.settings:
        objective[row.objective.lower()] = row.settings
    return {
        "model": {"uri": str(setting.model), "dtype": setting.dtype},
        "dataset": {"train": [{"uri": str(row.data)}], **row.dataset},
        "objective": objective,
        "method": {"type": row.method, **({"quantization": {"bits": 4}} if row.method == "QLoRA" else {})},
        "hyperparameters": {
            "maxSteps": row.steps,
            "batchSize": row.batch,
            "gradientAccumulationSteps": 1,
            "maxSequenceLength": row.tokens,
            "learningRate": row.learning_rate,
            **hyperparameters,
        },
        "output": {"uri": str(output)},
        "resources": {"gpus": 0},
    }


def numbers_of(path: Path) -> Numbers:
    """Return what the worker's events say of its training."""
    events = [parse_event(line) for line in path.read_text().splitlines()]
    steps = [e for e in events if isinstance(e, StepEvent)]
    (result,) = [e for e in events if isinstance(e, ResultEvent)]
    tokens = [step.tokens or 0 for step in steps]
    rates = [step.tokens_per_second or 0.0 for step in steps]
    return {
        "train_seconds": result.train_seconds,
        "step_seconds": [(b - a) / rate for a, b, rate in zip([0, *tokens], tokens, rates, strict=False)],
        "losses": [step.loss for step in steps],
        "tokens": tokens,
        "peak_bytes": result.peak_memory_bytes,
    }


def plain(row: Row, setting: Setting, starts_with: Path) -> Run:
    """Return a training with the plain script, which begins when the run with these events does."""

    def run(folder: Path, core: int) -> Numbers:
        arguments = {
            "objective": row.objective,
            "method": row.method,
            "model": str(setting.model),
            "dtype": setting.dtype,
            "rows": str(row.data),
            "steps": row.steps,
            "batch": row.batch,
            "tokens": row.tokens,
            "learning_rate": row.learning_rate,
            "settings": row.settings,
            "scratch": str(folder),
            "starts_with": str(starts_with),
        }
        script = [sys.executable, str(ROOT / "bench" / "trainer" / "plain_trl.py"), json.dumps(arguments)]
        return last_line(execute([*on_core(core), *script], {"HF_HUB_OFFLINE": "1"}))

    return run


def execute(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command on one thread."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


def last_line(process: subprocess.CompletedProcess[str]) -> Numbers:
    """Return the JSON that a run printed last."""
    if process.returncode != 0:
        sys.exit(f"{process.args} failed:\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
    numbers: Numbers = json.loads(process.stdout.splitlines()[-1])
    return numbers


def on_core(core: int) -> list[str]:
    """Return the command that holds what follows, and its children, to one core."""
    return ["taskset", "--cpu-list", str(core)]
