"""SFT with and without packing, on rows that average an eighth of the sequence length.

Both runs are tunewright's own and take the same number of rows per step on average: eight padded to the longest of
them, or one packed one. Lengths are log-normal with a standard deviation as large as their mean, about what instruction
data has (the docstrings of Python's standard library: 1.8 times the mean).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from bench.trainer.runs import Numbers, Setting, ours, pairs
from bench.trainer.summary import ratios, seconds, side, speed
from bench.trainer.table import PACKING, PROMPTS, Row

ROWS_PER_SEQUENCE = 8
ROWS = 512
PAIRS = 2
STEPS = 5
SIGMA = math.sqrt(math.log(2))
"""Of the logarithm: gives a standard deviation equal to the mean."""


def measure(setting: Setting, pair_count: int, steps: int, tokens: int) -> Numbers:
    """Run the pairs and return the row of results.json without its conditions.

    Args:
        setting: What all runs have in common.
        pair_count: Pairs of runs.
        steps: Optimizer steps of the padded runs; the packed ones take less time for a step and make twice as many.
        tokens: Length of a packed sequence.
    """
    packed_runs: list[Numbers] = []
    padded_runs: list[Numbers] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, setting.model, tokens)
        padded = Row(PACKING, "SFT", "LoRA", rows, 2e-4, steps=steps, batch=ROWS_PER_SEQUENCE, tokens=tokens)
        packed = replace(padded, steps=2 * steps, batch=1)
        for one, other in pairs(
            pair_count, lambda _: ours(packed, setting, {"packing": True}), lambda _: ours(padded, setting)
        ):
            packed_runs.append(one)
            padded_runs.append(other)
            print(f"{PACKING:20} packed {speed(one):7.1f} tokens/s, padded {speed(other):7.1f} tokens/s", flush=True)
    return {
        "arguments": {
            "tokens": tokens,
            "rows_per_sequence": ROWS_PER_SEQUENCE,
            "batch": {"packed": packed.batch, "padded": padded.batch},
            "steps": {"packed": packed.steps, "padded": padded.steps},
        },
        **ratios([speed(a) / speed(b) for a, b in zip(packed_runs, padded_runs, strict=True)]),
        "sides": {"packed": side(packed_runs), "padded": side(padded_runs)},
        "step_seconds": {"packed": seconds(packed_runs), "padded": seconds(padded_runs)},
    }


def write_rows(path: Path, model: Path, tokens: int) -> None:
    """Write rows of text whose lengths average an eighth of `tokens`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    ids = [i for text in texts for i in tokenizer.encode(f"{text['prompt']} {text['completion']}\n").ids]
    source = itertools.cycle(ids)
    with path.open("w") as file:
        for length in lengths(tokens):
            text = tokenizer.decode(list(itertools.islice(source, length)))
            file.write(json.dumps({"text": text}) + "\n")


def lengths(tokens: int) -> list[int]:
    """Draw the lengths of all rows in tokens."""
    draw = random.Random(42)
    mean = tokens / ROWS_PER_SEQUENCE
    drawn = [draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA) for _ in range(ROWS)]
    return [min(max(4, round(length)), tokens - 1) for length in drawn]
