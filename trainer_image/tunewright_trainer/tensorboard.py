"""TensorBoard event files, written without TensorBoard: a hundred lines against fifty megabytes of packages.

A file is a row of TFRecords, each one an Event protobuf. Only what scalars need is encoded here; the reader of the
tensorboard package itself checks the format in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from tunewright_trainer.protobuf import double, integer, message, single, text

FILE_PREFIX = "events.out.tfevents."
_CASTAGNOLI = 0x82F63B78
_MASK_DELTA = 0xA282EAD8


class EventFile:
    """One event file. Append-only, so what a killed process wrote can be read."""

    def __init__(self, folder: Path, name: str, started: float) -> None:
        """Begin a file.

        Args:
            folder: Made where it is missing.
            name: Goes into the file's name.
            started: Unix time in seconds.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{FILE_PREFIX}{int(started)}.{name}"
        self.path.write_bytes(_record(double(1, started) + text(3, "brain.Event:2")))

    def write(self, time: float, step: int, scalars: Mapping[str, float]) -> None:
        """Append numbers of a step, by tag; `time` is Unix time in seconds."""
        values = b"".join(message(1, text(1, tag) + single(2, value)) for tag, value in scalars.items())
        with self.path.open("ab") as file:
            file.write(_record(double(1, time) + integer(2, step) + message(5, values)))


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked_crc(length)) + data + struct.pack("<I", _masked_crc(data))


def _masked_crc(data: bytes) -> int:
    crc = _crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (_CASTAGNOLI if byte & 1 else 0)
    return byte


_TABLE = tuple(_crc_of_byte(byte) for byte in range(256))
