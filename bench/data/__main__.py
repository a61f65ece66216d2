"""What a million rows cost before the first step: `make bench-data`.

Writes 500 MB of chats as jsonl and runs them through supervisor and worker with a tiny model: the supervisor checks and
normalises every row, the worker tokenises them, and two steps are trained. Recorded are the seconds and the peak of
resident memory (limit 2 GB) of both, and how often they said how far they were.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import conditions
from tests.cluster.model import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
WORDS = ROOT / "examples" / "data" / "docstrings-train.jsonl"
LIMIT_MIB = 2e9 / 2**20
Numbers = dict[str, Any]


def main() -> int:
    """Measure, print, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows to write")
    parser.add_argument("--row-bytes", type=int, default=500, help="bytes of a row on average")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write")
    given = parser.parse_args()
    before = conditions()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        began = time.monotonic()
        write_rows(work / "rows.jsonl", given.rows, given.row_bytes)
        written = {
            "rows": given.rows,
            "bytes": (work / "rows.jsonl").stat().st_size,
            "write_seconds": time.monotonic() - began,
        }
        tiny_llama(work / "model")
        numbers = summarise(run(work), given.rows)
        numbers["log"] = log_lines(work / "work" / "logs" / "attempt-1.log")
    given.results.write_text(json.dumps({**before, **written, **numbers}, indent=2) + "\n")
    print_summary(numbers)
    return 0


def write_rows(path: Path, rows: int, row_bytes: int) -> None:
    """Write chats of words from docstrings, most of them in the answer."""
    words = [word for line in WORDS.read_text().splitlines() for word in json.loads(line)["completion"].split()]
    draw = random.Random(42)
    mean = sum(len(word) + 1 for word in words) / len(words)
    with path.open("w") as file:
        for number in range(rows):
            count = max(8, round(draw.uniform(0.2, 1.8) * (row_bytes - 80) / mean))
            text = draw.choices(words, k=count)
            asked = max(4, count // 5)
            turns = [
                {"role": "user", "content": f"{number}: {' '.join(text[:asked])}?"},
                {"role": "assistant", "content": " ".join(text[asked:])},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def run(work: Path) -> list[Numbers]:
    """Run supervisor and worker and return all that was said of their progress."""
    spec = {
        "model": {"uri": str(work / "model")},
        "dataset": {"train": [{"uri": str(work / "rows.jsonl")}]},
        "method": {"type": "LoRA"},
        "hyperparameters": {"maxSteps": 2, "batchSize": 2, "gradientAccumulationSteps": 1},
        "output": {"uri": str(work / "published")},
        "resources": {"gpus": 0},
    }
    head = {"apiVersion": "tunewright.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}}
    (work / "job.json").write_text(json.dumps({**head, "spec": spec}))
    command = [sys.executable, "-m", "bench.data.watched", str(work / "job.json"), str(work / "work")]
    # As in a pod, where nothing keeps the tokenizer to one thread; the Makefile does, for the tests.
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        sys.exit(f"{command} failed:\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
    said: list[Numbers] = json.loads(process.stdout.splitlines()[-1])["said"]
    return said


def summarise(said: list[Numbers], rows: int) -> Numbers:
    """Return seconds, memory and signs of progress of checking and tokenising."""
    checking = [s for s in said if s["stage"] == "Checking"]
    # From the task's hand-over to the first thing that the worker says after the last row.
    loading = [s for s in said if s["stage"] == "Loading"]
    training = next(s for s in said if s["stage"] == "Training")
    tokenised = max(i for i, s in enumerate(loading) if "tokenised" in (s["message"] or ""))
    return {
        "limit_mib": LIMIT_MIB,
        "checking": part([*checking, loading[0]], rows, "supervisor_bytes"),
        "tokenising": part(loading[: tokenised + 1], rows, "worker_bytes"),
        "to_first_step_seconds": training["seconds"] - loading[tokenised]["seconds"],
        "worker_peak_mib": max(s["worker_bytes"] for s in said) / 2**20,
        "supervisor_peak_mib": max(s["supervisor_bytes"] for s in said) / 2**20,
    }


def part(said: list[Numbers], rows: int, memory: str) -> Numbers:
    """Return the numbers of one part, from the first thing said of it to the last."""
    times = [s["seconds"] for s in said]
    taken = times[-1] - times[0]
    return {
        "seconds": taken,
        "rows_per_second": rows / taken,
        "peak_mib": max(s[memory] for s in said) / 2**20,
        "reports": len(said),
        "longest_silence_seconds": max(b - a for a, b in itertools.pairwise(times)),
    }


def log_lines(path: Path) -> list[str]:
    """Return what the log says of both parts: the heartbeat, for people."""
    return [line for line in path.read_text().splitlines() if "Checking" in line or "Loading" in line]


def print_summary(numbers: Numbers) -> None:
    """Print what was measured."""
    for name, who in (("checking", "supervisor"), ("tokenising", "worker")):
        measured = numbers[name]
        print(
            f"{name:11}{measured['seconds']:7.1f} s{measured['rows_per_second']:9.0f} rows/s, {who} peak RSS "
            f"{measured['peak_mib']:.0f} MiB (limit {numbers['limit_mib']:.0f}), {measured['reports']} reports, "
            f"longest silence {measured['longest_silence_seconds']:.1f} s"
        )
    print(f"whole run: worker peak RSS {numbers['worker_peak_mib']:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
