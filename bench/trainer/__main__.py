"""What the supervisor and the worker cost, and what packing brings: `make bench-trainer`.

For each row, a run through supervisor and worker and a plain script with the same arguments train SmolLM2-135M on the
same rows in the same order, at the same time, each on a core of its own; the next pair swaps the cores. One after the
other would measure the machine: on shared hardware its speed drifts by 10 % within a minute. A step is timed in both
from `on_step_begin` to `on_log`; the estimate is the median over the pairs of the ratio of all steps but the first.
Whole training times hold everything between the steps as well. The plain script waits for the worker's training to
begin: the worker has more to do before it, and would else have the machine to itself at the end.

Rows are merged into results.json one by one, each with the conditions that it was measured under.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from bench.machine import conditions
from bench.trainer import packing
from bench.trainer.runs import EVENTS, Numbers, Setting, ours, pairs, plain
from bench.trainer.summary import compare, event_cost, print_all, timed
from bench.trainer.table import HEADLINE, NAMES, PACKING, ROWS, Row
from tests.cluster.model import smollm2
from tunewright_trainer.hardware import find_hardware

RESULTS = Path(__file__).parent / "results.json"


def main() -> int:
    """Measure the rows that are asked for, write each into results.json, and print the table."""
    given = parse_arguments()
    dtype = "BFloat16" if find_hardware(0).computes_bfloat16 else "Float32"
    setting = Setting(smollm2(), dtype)
    for name in given.rows:
        before = conditions()
        if name == PACKING:
            pair_count, steps = given.pairs or packing.PAIRS, given.steps or packing.STEPS
            numbers = packing.measure(setting, pair_count, steps, given.packing_tokens)
        else:
            (row,) = (row for row in ROWS if row.name == name)
            numbers = measure(replace(row, pairs=given.pairs or row.pairs, steps=given.steps or row.steps), setting)
        keep(given.results, name, {**before, "dtype": dtype, **numbers})
    print_all(read(given.results), given.rows)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=names, default=list(NAMES), help=f"some of {','.join(NAMES)}; default: all")
    parser.add_argument("--pairs", type=int, help="pairs of runs per row instead of the row's own number; even")
    parser.add_argument("--steps", type=int, help="optimizer steps per run instead of the row's own number")
    parser.add_argument("--packing-tokens", type=int, default=512, help="sequence length of the row packing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the rows are merged into")
    return parser.parse_args()


def names(text: str) -> list[str]:
    """Parse --rows."""
    unknown = [name for name in text.split(",") if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no row is called {', '.join(unknown)}: there are {', '.join(NAMES)}")
    return text.split(",")


def measure(row: Row, setting: Setting) -> Numbers:
    """Run the pairs of a row and return its numbers."""
    runs = []
    for one, other in pairs(
        row.pairs,
        lambda _: ours(row, setting),
        lambda folder: plain(row, setting, starts_with=folder / "first" / EVENTS),
    ):
        runs.append((one, other))
        print(f"{row.name:20} steps: ours {timed(one):6.2f} s, plain {timed(other):6.2f} s", flush=True)
    numbers = compare(row, runs)
    return {**numbers, "event_microseconds": event_cost() * 1e6} if row.name == HEADLINE else numbers


def read(results: Path) -> dict[str, Numbers]:
    """Return the recorded rows."""
    rows: dict[str, Numbers] = json.loads(results.read_text())["rows"] if results.exists() else {}
    return rows


def keep(results: Path, name: str, numbers: Numbers) -> None:
    """Put a row into the file; the others stay as they are."""
    rows = {**read(results), name: numbers}
    ordered = {name: rows[name] for name in NAMES if name in rows}
    results.write_text(json.dumps({"rows": ordered}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
