"""Offline runs of Weights & Biases, written without its package: a hundred lines against eighty megabytes, most of them
a server process.

A file is a log in blocks, as LevelDB writes it, of `Record` protobufs. Only what a run with numbers needs is encoded
here; `wandb sync`, which sends such a run to a server, checks the format in the tests.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunewright_trainer.protobuf import integer, message, text

FILE_SUFFIX = ".wandb"
PRODUCER = "tunewright"
OLDEST_READER = "0.40.0"
"""The version of wandb from which on these records are understood; wandb wrote the same for years."""
_FILE_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK_BYTES = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
# Fields of Record.
_NUMBER, _HISTORY, _SUMMARY, _RUN, _EXIT, _FILE = 1, 2, 3, 17, 18, 21


class OfflineRun:
    """One offline run. Append-only; the numbers of a step are written when the next step begins."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        *,
        project: str,
        entity: str | None,
        name: str,
        started: float,
        config: Mapping[str, Any],
    ) -> None:
        """Begin a run.

        Args:
            folder: Gets the run's own folder, named as wandb names it.
            run_id: Lower-case letters and digits, unique in the project.
            project: W&B's project.
            entity: User or team that the project belongs to; None: whoever sends the run.
            name: Shown for the run.
            started: Unix time in seconds.
            config: What was asked for, as JSON.
        """
        stamp = datetime.fromtimestamp(started, UTC).strftime("%Y%m%d_%H%M%S")
        self.path = folder / f"offline-run-{stamp}-{run_id}" / f"run-{run_id}{FILE_SUFFIX}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(_FILE_HEADER)
        self._bytes = len(_FILE_HEADER)
        self._count = 0
        self._started = started
        self._step: int | None = None
        self._row: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._append(message(_FILE, message(1, text(1, PRODUCER) + text(2, OLDEST_READER))))
        items = b"".join(message(1, text(1, key) + text(16, json.dumps(value))) for key, value in config.items())
        moment = integer(1, int(started)) + integer(2, int(started % 1 * 1e9))
        owner = text(2, entity) if entity is not None else b""
        run = text(1, run_id) + owner + text(3, project) + message(4, items) + text(8, name) + message(17, moment)
        self._append(message(_RUN, run))

    def write(self, time: float, step: int, scalars: Mapping[str, float]) -> None:
        """Take numbers of a step, by name; steps do not go back. `time` is Unix time in seconds."""
        if step != self._step:
            self._write_row()
            self._step = step
        self._row |= {**scalars, "_timestamp": time, "_runtime": time - self._started}

    def finish(self, time: float) -> None:
        """Write what is left, and that the run ended well."""
        self._write_row()
        items = b"".join(message(1, _item(name, value)) for name, value in self._last.items())
        self._append(message(_SUMMARY, items))
        self._append(message(_EXIT, integer(2, int(time - self._started))))

    def _write_row(self) -> None:
        if self._step is None:
            return
        row = {**self._row, "_step": self._step}
        items = b"".join(message(1, _item(name, value)) for name, value in row.items())
        self._append(message(_HISTORY, items + message(2, integer(1, self._step))))
        self._last |= row
        self._row = {}

    def _append(self, content: bytes) -> None:
        """Write a record, cut where a block ends."""
        self._count += 1
        rest, kind = integer(_NUMBER, self._count) + content, _FULL
        pieces = bytearray()
        while True:
            room = _BLOCK_BYTES - (self._bytes + len(pieces)) % _BLOCK_BYTES
            if room < _HEADER.size:
                pieces += bytes(room)
                continue
            part, rest = rest[: room - _HEADER.size], rest[room - _HEADER.size :]
            if rest:
                kind = _FIRST if kind == _FULL else _MIDDLE
            elif kind != _FULL:
                kind = _LAST
            pieces += _HEADER.pack(zlib.crc32(part, zlib.crc32(bytes((kind,)))), len(part), kind) + part
            if not rest:
                break
        with self.path.open("ab") as file:
            file.write(pieces)
        self._bytes += len(pieces)


def _item(name: str, value: float) -> bytes:
    """Encode an entry of a history row or the summary: a path of names, here of one, and JSON."""
    return text(2, name) + text(16, json.dumps(value))
