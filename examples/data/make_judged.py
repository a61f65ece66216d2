"""Make the example data sets with judged answers and with labels, out of the questions and answers beside this file.

    python examples/data/make_judged.py [FOLDER]

preference-{train,validation}.jsonl: {"prompt", "chosen", "rejected"}; rejected is the answer to another question.
labelled-{train,validation}.jsonl: {"text", "label"}; the text is an answer, the label says whether it tells what a
function returns or what it does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("train", "validation")


def read(part: str) -> list[dict[str, str]]:
    """Return the questions and answers of a part."""
    return [json.loads(line) for line in (HERE / f"docstrings-{part}.jsonl").read_text().splitlines()]


def preference(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return each question with its own answer and the next question's."""
    others = [*rows[1:], rows[0]]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, others, strict=True)
    ]


def labelled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return each answer with a label for its verb."""
    answers = [row["completion"] for row in rows]
    return [{"text": text, "label": "returns" if text.startswith("Return") else "acts"} for text in answers]


def write(folder: Path) -> None:
    """Write all four files."""
    for part in PARTS:
        for name, make in (("preference", preference), ("labelled", labelled)):
            text = "".join(json.dumps(row) + "\n" for row in make(read(part)))
            (folder / f"{name}-{part}.jsonl").write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
