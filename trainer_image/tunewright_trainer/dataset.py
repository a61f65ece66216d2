"""Checks all rows and writes them down as the worker reads them. One bad row fails the run before it costs anything."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_api.v1alpha1.parts import Dataset, DataSource
from tunewright_trainer.data_files import BadRow, Row, read_rows
from tunewright_trainer.data_formats import ChosenFormat, choose_format, with_templates
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.fields import BadField, listed
from tunewright_trainer.prompt_format import check_columns
from tunewright_trainer.transfer import Advance, Stop

MAX_BAD_ROWS = 20
"""Enough to see a pattern; reading on would only delay the news."""
MAX_MESSAGE_CHARACTERS = 900
"""What of it goes into the status; the log has them all."""
STOP_CHECK_ROWS = 1000


@dataclass(frozen=True)
class PreparedData:
    """Checked rows on disk."""

    format: ChosenFormat
    train_path: Path
    validation_path: Path | None
    train_rows: int
    validation_rows: int


class BadRows(InvalidData):
    """Rows that cannot be trained on; `lines` has one entry for each, `str()` as many as a status holds."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        count = f"at least {len(lines)}" if len(lines) >= MAX_BAD_ROWS else str(len(lines))
        text = f"{count} bad row{'s' if len(lines) > 1 else ''}, nothing was trained:"
        shown = 0
        for line in lines:
            if shown and len(text) + len(line) > MAX_MESSAGE_CHARACTERS:
                break
            text += f"\n{line[:MAX_MESSAGE_CHARACTERS]}"
            shown += 1
        if shown < len(lines):
            text += f"\nand {len(lines) - shown} more in the log"
        super().__init__(text)


def prepare(
    dataset: Dataset,
    paths: Mapping[str, Mapping[str, Path]],
    folder: Path,
    seed: int,
    stop: Stop,
    advance: Advance,
    objective: ObjectiveType = "SFT",
    reward_columns: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> PreparedData:
    """Check and normalise a data set.

    Args:
        dataset: What is wanted.
        paths: Where the files of each source lie on this machine: by the source's address, in order by the file's URI.
        folder: Where train.jsonl and validation.jsonl go.
        seed: Chooses the rows of validationFraction.
        stop: Ends the work when it is requested.
        advance: Told the bytes read.
        objective: What is learned from the rows.
        reward_columns: Columns that rewards read besides the prompt.
        labels: All labels that rows of format Labelled may have; none: whatever they have.

    Raises:
        BadRows: Rows are unusable.
        InvalidData: A file as a whole is, or there are too few rows.
        InvalidConfiguration: dataset.columns does not fit the format.
        Preempted: A stop was requested.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = _Preparation(dataset, objective, reward_columns, labels, paths, seed, stop, advance)
    train_path, validation_path = folder / "train.jsonl", folder / "validation.jsonl"
    train_rows = job.write(dataset.train, train_path)
    validation_rows = job.write(dataset.validation, validation_path) if dataset.validation else 0
    if job.bad:
        raise BadRows(job.bad)
    if train_rows == 0 or job.format is None:
        raise InvalidData(f"{', '.join(s.uri for s in dataset.train)}: no rows")
    if dataset.validation and validation_rows == 0:
        raise InvalidData(f"{', '.join(s.uri for s in dataset.validation)}: no rows")
    if dataset.validation_fraction is not None:
        validation_rows = validation_count(train_rows, dataset.validation_fraction)
        train_rows -= validation_rows
        _split(train_path, validation_path, train_rows + validation_rows, validation_rows, seed)
    return PreparedData(
        job.format, train_path, validation_path if validation_rows else None, train_rows, validation_rows
    )


def validation_count(rows: int, fraction: float) -> int:
    """Return how many of `rows` are held out: the fraction, but at least one row on either side.

    Raises:
        InvalidData: There is only one row.
    """
    if rows < 2:
        raise InvalidData(f"dataset.validationFraction needs at least 2 rows to split, there is {rows}")
    return min(max(1, round(rows * fraction)), rows - 1)


class _Preparation:
    """What has been seen over all files: the format, and the bad rows."""

    def __init__(
        self,
        dataset: Dataset,
        objective: ObjectiveType,
        reward_columns: Sequence[str],
        labels: Sequence[str],
        paths: Mapping[str, Mapping[str, Path]],
        seed: int,
        stop: Stop,
        advance: Advance,
    ) -> None:
        self.format: ChosenFormat | None = None
        self.bad: list[str] = []
        self._dataset = dataset
        self._objective = objective
        self._reward_columns = reward_columns
        self._labels = frozenset(labels)
        self._paths = paths
        self._seed = seed
        self._stop = stop
        self._advance = advance

    def write(self, sources: Sequence[DataSource], target: Path) -> int:
        """Write the good rows of all sources; return their number."""
        with target.open("w", encoding="utf-8") as output:
            return sum(self._write_source(source, output) for source in sources)

    def _write_source(self, source: DataSource, output: TextIO) -> int:
        written = 0
        copies = _Copies(source.weight, self._seed)
        for seen, (uri, row) in enumerate(self._rows(source)):
            if seen == source.max_samples or len(self.bad) >= MAX_BAD_ROWS:
                break
            if seen % STOP_CHECK_ROWS == 0:
                self._stop.check()
            values = self._normalised(uri, row)
            if values is not None:
                count = copies.next()
                output.write((json.dumps(values, ensure_ascii=False) + "\n") * count)
                written += count
        return written

    def _rows(self, source: DataSource) -> Iterator[tuple[str, Row | BadRow]]:
        """Yield the rows of all files of a source, each with the file's URI."""
        for uri, path in self._paths[source.address].items():
            for row in read_rows(path, uri, self._advance):
                yield uri, row

    def _normalised(self, uri: str, row: Row | BadRow) -> dict[str, Any] | None:
        if isinstance(row, Row):
            if self.format is None:
                place = f"{uri}: {row.place}"
                dataset = self._dataset
                chosen = choose_format(dataset.format, dataset.columns, row.values, place, self._objective)
                self.format = with_templates(chosen, dataset, row.values, place)
            try:
                check_columns(row.values, self._reward_columns)
                return self._labelled_as_known(self.format.normalise(row.values))
            except BadField as error:
                row = BadRow(row.place, error.message, error.field)
        field = f": {row.field}" if row.field else ""
        self.bad.append(f"{uri}: {row.place}{field}: {row.message}")
        return None

    def _labelled_as_known(self, values: dict[str, Any]) -> dict[str, Any]:
        assert self.format is not None, "set by the first row"
        if self._labels and self.format.name == "Labelled" and values["label"] not in self._labels:
            raise BadField(
                self.format.names["label"],
                f"is {values['label']!r}, which is not among the labels {listed(sorted(self._labels))}",
            )
        return values


class _Copies:
    """How often each row of a source is written: its weight, drawn where that is no whole number."""

    def __init__(self, weight: float, seed: int) -> None:
        self._whole, self._rest = int(weight), weight % 1
        self._random = random.Random(seed)  # noqa: S311 - a draw, not a secret

    def next(self) -> int:
        """Return the number of copies of the next row."""
        return self._whole + (self._rest > 0 and self._random.random() < self._rest)


def _split(train: Path, validation: Path, rows: int, held_out: int, seed: int) -> None:
    chosen = set(random.Random(seed).sample(range(rows), held_out))  # noqa: S311 - a split, not a secret
    whole = train.with_suffix(".all")
    train.rename(whole)
    with (
        whole.open(encoding="utf-8") as source,
        train.open("w", encoding="utf-8") as kept,
        validation.open("w", encoding="utf-8") as held,
    ):
        for index, line in enumerate(source):
            (held if index in chosen else kept).write(line)
    whole.unlink()
