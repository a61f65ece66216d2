"""What the supervisor and the worker cost: `make bench-trainer`.

A run through supervisor and worker and a plain TRL script with the same arguments train SmolLM2-135M with LoRA on the
same rows in the same order, one after the other, several times in alternating order. A step is timed in both from
`on_step_begin` to `on_log`; the headline takes the fastest time of every step (the machine's other work only ever
adds to it), summed over all steps but the first. Whole training times hold everything between the steps as well.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.cluster.model import smollm2
from tunewright_trainer.protocol import PlanEvent, ResultEvent, StepEvent, parse_event, write_event

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
ROWS = ROOT / "examples" / "data" / "docstrings-train.jsonl"
Numbers = dict[str, Any]


def main() -> int:
    """Run the benchmark, print its table, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per run")
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a row is cut to")
    # One thread: with more, a step also measures how threads wait for each other on a machine that does other work.
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch, in both")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    model = smollm2()
    ours: list[Numbers] = []
    plain: list[Numbers] = []
    for repeat in range(given.repeats):
        first_is_ours = repeat % 2 == 0
        for kind in ("ours", "plain") if first_is_ours else ("plain", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                if kind == "ours":
                    ours.append(run_ours(model, Path(folder), given))
                else:
                    plain.append(run_plain(model, Path(folder), given, ours[0]["dtype"]))
            numbers = (ours if kind == "ours" else plain)[-1]
            print(
                f"{kind:5} {numbers['train_seconds']:7.2f} s of training, {steady(numbers):.3f} s per step", flush=True
            )
    result = summarise(ours, plain, given)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    return 0


def run_ours(model: Path, folder: Path, given: argparse.Namespace) -> Numbers:
    """Train through supervisor and worker."""
    spec = {
        "model": {"uri": str(model)},
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
    command = [sys.executable, "-m", "bench.trainer.supervised", str(folder / "job.json"), str(work)]
    numbers = last_line(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    events = [parse_event(line) for line in (work / "events.jsonl").read_text().splitlines()]
    steps = [e for e in events if isinstance(e, StepEvent)]
    (plan,) = [e for e in events if isinstance(e, PlanEvent)]
    (result,) = [e for e in events if isinstance(e, ResultEvent)]
    tokens = [step.tokens or 0 for step in steps]
    rates = [step.tokens_per_second or 0.0 for step in steps]
    return {
        **numbers,
        "dtype": plan.dtype,
        "train_seconds": result.train_seconds,
        "step_seconds": [(b - a) / rate for a, b, rate in zip([0, *tokens], tokens, rates, strict=False)],
        "losses": [step.loss for step in steps],
        "tokens": tokens,
        "peak_bytes": result.peak_memory_bytes,
    }


def run_plain(model: Path, folder: Path, given: argparse.Namespace, dtype: str) -> Numbers:
    """Train with the plain script."""
    arguments = [str(model), str(ROWS), str(given.steps), str(given.batch), str(given.tokens), dtype, str(folder)]
    command = [sys.executable, str(ROOT / "bench" / "trainer" / "plain_trl.py"), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return last_line(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False))


def last_line(process: subprocess.CompletedProcess[str]) -> Numbers:
    """Return the JSON that a run printed last."""
    if process.returncode != 0:
        sys.exit(f"{process.args} failed:\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
    numbers: Numbers = json.loads(process.stdout.splitlines()[-1])
    return numbers


def steady(numbers: Numbers) -> float:
    """Return the median step time without the first step, which warms caches up."""
    return float(statistics.median(numbers["step_seconds"][1:]))


def summarise(ours: list[Numbers], plain: list[Numbers], given: argparse.Namespace) -> Numbers:
    """Return the document of results.json."""
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": {name: version(name) for name in ("tunewright", "torch", "transformers", "trl", "peft")}
        | {"python": platform.python_version()},
        "arguments": vars(given) | {"dtype": ours[0]["dtype"]},
        "rows": [row("tunewright", ours), row("plain TRL", plain)],
        "step_time_ratio": fastest_steps(ours) / fastest_steps(plain),
        "train_time_ratio": min(n["train_seconds"] for n in ours) / min(n["train_seconds"] for n in plain),
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
    fastest = fastest_steps(runs)
    return {
        "name": name,
        "runs": len(runs),
        "fastest_step_seconds": fastest / (len(tokens) - 1),
        "median_step_seconds": statistics.median(s for run in runs for s in run["step_seconds"][1:]),
        "tokens_per_second": (tokens[-1] - tokens[0]) / fastest,
        "train_seconds": min(run["train_seconds"] for run in runs),
        "peak_mib": max(run["peak_bytes"] for run in runs) / 2**20,
    }


def fastest_steps(runs: list[Numbers]) -> float:
    """Return the sum over all steps but the first of each step's fastest time."""
    return float(sum(min(times) for times in list(zip(*(run["step_seconds"] for run in runs), strict=True))[1:]))


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
    print(f"\n{'':12}{'fastest s/step':>16}{'median s/step':>16}{'tokens/s':>12}{'training s':>12}{'peak MiB':>12}")
    for r in result["rows"]:
        print(
            f"{r['name']:12}{r['fastest_step_seconds']:16.3f}{r['median_step_seconds']:16.3f}"
            f"{r['tokens_per_second']:12.1f}{r['train_seconds']:12.2f}{r['peak_mib']:12.0f}"
        )
    print(f"one event: {result['event_microseconds']:.0f} microseconds")
    print(f"worker starts {result['worker_start_seconds']:.2f} s after the supervisor (limit 1.5)")
    print(f"supervisor peak RSS {result['supervisor_peak_mib']:.0f} MiB (limit 150)")
    print(f"training time, tunewright / plain TRL: {result['train_time_ratio']:.3f}")
    print(f"step time, tunewright / plain TRL: {result['step_time_ratio']:.3f} (limit 1.02)")


if __name__ == "__main__":
    sys.exit(main())
