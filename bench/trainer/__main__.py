"""What the supervisor and the worker cost: `make bench-trainer`.

A run through supervisor and worker and a plain TRL script with the same arguments train SmolLM2-135M with LoRA on the
same rows in the same order, at the same time, each on a core of its own; the next pair swaps the cores. One after the
other would measure the machine: on shared hardware its speed drifts by 10 % within a minute. A step is timed in both
from `on_step_begin` to `on_log`; the headline is the median over the pairs of the ratio of all steps but the first.
Whole training times hold everything between the steps as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.cluster.model import smollm2
from tunewright_trainer.hardware import find_hardware
from tunewright_trainer.protocol import ResultEvent, StepEvent, parse_event, write_event

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
ROWS = ROOT / "examples" / "data" / "docstrings-train.jsonl"
Numbers = dict[str, Any]


def main() -> int:
    """Run the benchmark, print its table, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of runs; even, so that each has each core as often")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per run")
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a row is cut to")
    given = parser.parse_args()
    given.dtype = "BFloat16" if find_hardware(0).computes_bfloat16 else "Float32"
    os.environ["OMP_NUM_THREADS"] = "1"
    model = smollm2()
    ours: list[Numbers] = []
    plain: list[Numbers] = []
    cores = sorted(os.sched_getaffinity(0))[:2]
    for _ in range(given.pairs):
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            one = pool.submit(run_ours, model, Path(folder) / "ours", given, cores[0])
            other = pool.submit(run_plain, model, Path(folder) / "plain", given, cores[1])
            ours.append(one.result())
            plain.append(other.result())
        cores.reverse()
        print(f"steps: ours {steps(ours[-1]):6.2f} s, plain {steps(plain[-1]):6.2f} s", flush=True)
    result = summarise(ours, plain, given)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    return 0


def run_ours(model: Path, folder: Path, given: argparse.Namespace, core: int) -> Numbers:
    """Train through supervisor and worker."""
    folder.mkdir()
    spec = {
        "model": {"uri": str(model), "dtype": given.dtype},
        "dataset": {"train": [{"uri": str(ROWS)}]},
        "method": {"type": "LoRA"},
        "hyperparameters": {
            "maxSteps": given.steps,
            "batchSize": given.batch,
            "gradientAccumulationSteps": 1,
            "maxSequenceLength": given.tokens,
        },
        "output": {"uri": str(folder / "published")},
        "resources": {"gpus": 0},
    }
    head = {"apiVersion": "tunewright.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}}
    (folder / "job.json").write_text(json.dumps({**head, "spec": spec}))
    work = folder / "work"
    work.mkdir()
    command = [*on_core(core), sys.executable, "-m", "bench.trainer.supervised", str(folder / "job.json"), str(work)]
    numbers = last_line(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    events = [parse_event(line) for line in (work / "events.jsonl").read_text().splitlines()]
    steps = [e for e in events if isinstance(e, StepEvent)]
    (result,) = [e for e in events if isinstance(e, ResultEvent)]
    tokens = [step.tokens or 0 for step in steps]
    rates = [step.tokens_per_second or 0.0 for step in steps]
    return {
        **numbers,
        "train_seconds": result.train_seconds,
        "step_seconds": [(b - a) / rate for a, b, rate in zip([0, *tokens], tokens, rates, strict=False)],
        "losses": [step.loss for step in steps],
        "tokens": tokens,
        "peak_bytes": result.peak_memory_bytes,
    }


def run_plain(model: Path, folder: Path, given: argparse.Namespace, core: int) -> Numbers:
    """Train with the plain script."""
    arguments = [str(model), str(ROWS), str(given.steps), str(given.batch), str(given.tokens), given.dtype, str(folder)]
    command = [*on_core(core), sys.executable, str(ROOT / "bench" / "trainer" / "plain_trl.py"), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return last_line(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False))


def last_line(process: subprocess.CompletedProcess[str]) -> Numbers:
    """Return the JSON that a run printed last."""
    if process.returncode != 0:
        sys.exit(f"{process.args} failed:\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
    numbers: Numbers = json.loads(process.stdout.splitlines()[-1])
    return numbers


def on_core(core: int) -> list[str]:
    """Return the command that holds what follows, and its children, to one core."""
    return ["taskset", "--cpu-list", str(core)]


def steps(numbers: Numbers) -> float:
    """Return the seconds of all steps but the first, which warms caches up."""
    return float(sum(numbers["step_seconds"][1:]))


def summarise(ours: list[Numbers], plain: list[Numbers], given: argparse.Namespace) -> Numbers:
    """Return the document of results.json."""
    pairs = list(zip(ours, plain, strict=True))
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": {name: version(name) for name in ("tunewright", "torch", "transformers", "trl", "peft")}
        | {"python": platform.python_version()},
        "arguments": vars(given),
        "rows": [row("tunewright", ours), row("plain TRL", plain)],
        "step_time_ratio": statistics.median(steps(a) / steps(b) for a, b in pairs),
        "step_time_ratios": [steps(a) / steps(b) for a, b in pairs],
        "train_time_ratio": statistics.median(a["train_seconds"] / b["train_seconds"] for a, b in pairs),
        "largest_loss_difference": max(
            abs(a - b) for a, b in zip(ours[0]["losses"][:2], plain[0]["losses"][:2], strict=True)
        ),
        "worker_start_seconds": statistics.median(n["worker_start_seconds"] for n in ours),
        "supervisor_peak_mib": max(n["supervisor_peak_bytes"] for n in ours) / 2**20,
        "event_microseconds": event_cost() * 1e6,
        "runs": {"tunewright": ours, "plain TRL": plain},
    }


def row(name: str, runs: list[Numbers]) -> Numbers:
    """Return a row of the table."""
    tokens = runs[0]["tokens"]
    seconds = statistics.median(steps(run) for run in runs)
    return {
        "name": name,
        "runs": len(runs),
        "step_seconds": seconds / (len(tokens) - 1),
        "tokens_per_second": (tokens[-1] - tokens[0]) / seconds,
        "train_seconds": statistics.median(run["train_seconds"] for run in runs),
        "peak_mib": max(run["peak_bytes"] for run in runs) / 2**20,
    }


def event_cost(count: int = 1000) -> float:
    """Return the seconds that reporting one step takes."""
    event = StepEvent(step=1, epoch=0.1, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=1, tokens_per_second=1.0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for _ in range(count):
            write_event(Path(folder), event)
        return (time.perf_counter() - began) / count


def cpu_name() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(result: Numbers) -> None:
    """Print the rows and, last, the headline."""
    print(f"\n{'':12}{'s/step':>10}{'tokens/s':>12}{'training s':>12}{'peak MiB':>12}")
    for r in result["rows"]:
        print(
            f"{r['name']:12}{r['step_seconds']:10.3f}{r['tokens_per_second']:12.1f}"
            f"{r['train_seconds']:12.2f}{r['peak_mib']:12.0f}"
        )
    print(f"one event: {result['event_microseconds']:.0f} microseconds")
    print(f"worker starts {result['worker_start_seconds']:.2f} s after the supervisor (limit 1.5)")
    print(f"supervisor peak RSS {result['supervisor_peak_mib']:.0f} MiB (limit 150)")
    print(f"training time, tunewright / plain TRL: {result['train_time_ratio']:.3f}")
    print(f"step time, tunewright / plain TRL: {result['step_time_ratio']:.3f} (limit 1.02)")


if __name__ == "__main__":
    sys.exit(main())
