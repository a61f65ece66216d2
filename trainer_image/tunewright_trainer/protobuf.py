"""Protobuf on the wire, as much as TensorBoard's and W&B's files need. Each function returns one encoded field."""

from __future__ import annotations

import struct

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def integer(number: int, value: int) -> bytes:
    """Encode a whole number that is not negative."""
    return _key(number, _VARINT) + _varint(value)


def double(number: int, value: float) -> bytes:
    """Encode a number in 64 bits."""
    return _key(number, _FIXED64) + struct.pack("<d", value)


def single(number: int, value: float) -> bytes:
    """Encode a number in 32 bits."""
    return _key(number, _FIXED32) + struct.pack("<f", value)


def text(number: int, value: str) -> bytes:
    """Encode a text."""
    return message(number, value.encode())


def message(number: int, content: bytes) -> bytes:
    """Encode a message that consists of encoded fields."""
    return _key(number, _BYTES) + _varint(len(content)) + content


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
