"""What a merge costs, against peft's and against a plain copy: `make bench-merge`.

`smollm2` merges a LoRA adapter (rank 16, all linear layers) into SmolLM2-135M, from folder to folder, by us and by the
usual script on peft; `3b-peft` does the same with a random checkpoint of 3.2 billion parameters. Both sides are timed
as whole processes, imports included: that is what a pod pays.

`3b` and `7b` merge such adapters into random bfloat16 checkpoints in 5 shards that the benchmark makes, from S3 to S3
(SeaweedFS on this machine), and are timed against copying the same bytes through the same client: reading every byte
once and writing every byte once is the least that a merge can do. Server and client share the machine's cores.

The two sides of a row alternate; recorded are the seconds of each, the median of the ratios, and the peaks of resident
memory. Rows are merged into results.json one by one. All data is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import conditions
from bench.merge.models import SHAPES, write_adapter, write_base
from bench.merge.place import ENDPOINT, storage
from tests.cluster.model import smollm2
from tests.cluster.s3 import S3Server
from tests.trainer.kit import make_bucket
from tunewright_trainer.merge.sinks import FolderSink, StorageSink

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
LOCAL = "smollm2"
AGAINST_PEFT = "-peft"
"""End of the names of the other rows that go from folder to folder."""
ROWS = (LOCAL, *(f"{name}{AGAINST_PEFT}" for name in SHAPES if name != LOCAL), *(n for n in SHAPES if n != LOCAL))
RECORDED = (LOCAL, f"3b{AGAINST_PEFT}", "3b", "7b")
LIMIT_MIB = 600
Numbers = dict[str, Any]


def main() -> int:
    """Measure the rows that are asked for, write each into results.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=names, default=list(RECORDED), help=f"some of {','.join(ROWS)}; default: recorded ones"
    )
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--data", type=Path, help="folder for the data, three times a model's size; default: temporary")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the rows are merged into")
    given = parser.parse_args()
    for name in given.rows:
        before = conditions()
        with tempfile.TemporaryDirectory(dir=given.data) as folder:
            measure = against_peft if is_local(name) else against_copy
            numbers = measure(name, Path(folder), given.pairs)
        keep(given.results, name, {**before, **numbers})
        print_row(name, numbers)
    return 0


def names(text: str) -> list[str]:
    """Parse --rows."""
    unknown = [name for name in text.split(",") if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no row is called {', '.join(unknown)}: there are {', '.join(ROWS)}")
    return text.split(",")


def is_local(name: str) -> bool:
    """Tell whether a row goes from folder to folder, and is compared with peft."""
    return name == LOCAL or name.endswith(AGAINST_PEFT)


def against_peft(name: str, work: Path, pairs: int) -> Numbers:
    """Compare with the usual script, both as whole processes."""
    shape = SHAPES[name.removesuffix(AGAINST_PEFT)]
    write_adapter(shape, work / "adapter")
    base = smollm2()
    if name != LOCAL:
        write_base(shape, FolderSink(work / "base"))
        for path in base.glob("*token*"):
            shutil.copy(path, work / "base")
        base = work / "base"
    arguments = (str(base), str(work / "adapter"))

    def run(module: str) -> Numbers:
        numbers = timed(module, *arguments, str(work / "merged"))
        shutil.rmtree(work / "merged")
        return numbers

    numbers = compare(pairs, "peft", lambda: run("ours"), lambda: run("plain_peft"))
    return {"parameters": shape.parameters(), **numbers}


def against_copy(name: str, work: Path, pairs: int) -> Numbers:
    """Compare with copying the same bytes from S3 to S3."""
    shape = SHAPES[name]
    write_adapter(shape, work / "adapter")
    with S3Server.start(work / "s3") as server:
        base = make_bucket(server, "base")
        os.environ.update({**base.environment, ENDPOINT: server.endpoint})
        size = write_base(shape, StorageSink(storage(), "s3://base/model"))
        runs = 0

        def run(module: str, *arguments: str) -> Numbers:
            # A bucket of its own for every run: the server frees the space of a bucket, not that of an object.
            nonlocal runs
            runs += 1
            target = make_bucket(server, f"target-{runs}")
            numbers = timed(module, "s3://base/model", *arguments, f"s3://{target.name}/model")
            for key in target.stored():
                target.client.delete_object(Bucket=target.name, Key=key)
            target.client.delete_bucket(Bucket=target.name)
            return numbers

        numbers = compare(pairs, "copy", lambda: run("ours", str(work / "adapter")), lambda: run("plain_copy"))
    return {"parameters": shape.parameters(), "bytes": size, **numbers}


def timed(module: str, *arguments: str) -> Numbers:
    """Run a module of this package as a process and return its seconds and its peak of memory."""
    command = [sys.executable, "-m", f"bench.merge.{module}", *arguments]
    began = time.monotonic()
    cpu = os.times()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    after = os.times()
    if done.returncode != 0:
        sys.exit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    peak = json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / 2**20
    spent = after.children_user + after.children_system - cpu.children_user - cpu.children_system
    print(f"{module:10} {seconds:7.1f} s, {spent:6.1f} s of CPU, peak RSS {peak:5.0f} MiB", flush=True)
    return {"seconds": seconds, "cpu_seconds": spent, "peak_mib": peak}


def compare(pairs: int, other: str, ours: Callable[[], Numbers], theirs: Callable[[], Numbers]) -> Numbers:
    """Run both sides in turns and return their numbers; the order changes with every pair."""
    runs: dict[str, list[Numbers]] = {"ours": [], other: []}
    for pair in range(pairs):
        for side, run in ((("ours", ours), (other, theirs)), ((other, theirs), ("ours", ours)))[pair % 2]:
            runs[side].append(run())
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], runs[other], strict=True)]
    return {
        "limit_mib": LIMIT_MIB,
        "seconds_to_" + other: statistics.median(ratios),
        "peak_mib": max(run["peak_mib"] for run in runs["ours"]),
        "runs": runs,
    }


def keep(results: Path, name: str, numbers: Numbers) -> None:
    """Put a row into the file; the others stay as they are."""
    rows: dict[str, Numbers] = json.loads(results.read_text())["rows"] if results.exists() else {}
    rows[name] = numbers
    ordered = {name: rows[name] for name in ROWS if name in rows}
    results.write_text(json.dumps({"rows": ordered}, indent=2) + "\n")


def print_row(name: str, numbers: Numbers) -> None:
    """Print what was measured."""
    other = "peft" if is_local(name) else "copy"
    ratio, peak = numbers[f"seconds_to_{other}"], numbers["peak_mib"]
    print(f"{name}: {ratio:.2f} times the seconds of {other}, peak RSS {peak:.0f} MiB (limit {LIMIT_MIB})")


if __name__ == "__main__":
    sys.exit(main())
