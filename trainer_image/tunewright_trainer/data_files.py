"""Reads rows out of jsonl, json, csv and parquet files, one after another: memory does not grow with the file."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tunewright_trainer.errors import InvalidData
from tunewright_trainer.transfer import Advance

MAX_ROW_BYTES = 64 * 1024 * 1024
"""Longest row: some 16 million tokens, so anything longer is a file of another kind."""
CHUNK_BYTES = 1024 * 1024
PARQUET_BATCH_ROWS = 1024
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file."""

    place: str
    """Where, for people: `line 12`, `row 12`."""
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row, or a part of one, that cannot be used."""

    place: str
    message: str
    field: str | None = None


def read_rows(path: Path, uri: str, advance: Advance) -> Iterator[Row | BadRow]:
    """Yield the rows of a file and, in their place, those that cannot be read.

    Args:
        path: The file on this machine.
        uri: Its name in messages; the ending tells the kind.
        advance: Told the bytes read.

    Raises:
        InvalidData: The file as a whole is unusable.
    """
    readers: dict[str, Callable[[Path, str, Advance], Iterator[Row | BadRow]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    suffix = Path(uri).suffix.lower()
    if suffix not in readers:
        raise InvalidData(
            f"{uri}: files of kind {suffix or 'without ending'!r} are not read: use .jsonl, .json, .csv or .parquet"
        )
    if path.stat().st_size == 0:
        raise InvalidData(f"{uri}: the file is empty (0 bytes)")
    return readers[suffix](path, uri, advance)


def _read_jsonl(path: Path, uri: str, advance: Advance) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, line in _lines(file, uri, advance):
            if line.strip():
                yield _json_row(line, f"line {number:,}")


def _json_row(line: str, place: str) -> Row | BadRow:
    try:
        value = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        # Some of json's messages end with the "at" that belongs before a position.
        return BadRow(place, f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}")
    except RecursionError:
        return BadRow(place, "not usable JSON: nested too deeply")
    return _object_row(value, place)


def _object_row(value: Any, place: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(place, f"must be a JSON object with named fields, is {kind_of(value)}")
    return Row(place, value)


def _read_json(path: Path, uri: str, advance: Advance) -> Iterator[Row | BadRow]:
    """Read an array of objects; one object a line, which many tools write under this ending, is taken as well."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"["):
        yield from _read_jsonl(path, uri, advance)
        return
    yield from _read_array(path, uri, advance)


def _read_array(path: Path, uri: str, advance: Advance) -> Iterator[Row | BadRow]:
    """Decode the elements of an array one by one.

    An element that does not decode is either cut off by the end of the buffer or broken; reading on until it decodes,
    the file ends or the row is too long tells them apart.
    """
    decoder = json.JSONDecoder()
    with path.open("rb") as file:
        buffer = _Buffer(file, uri, advance)
        buffer.skip("[")
        number = 0
        while not buffer.at("]"):
            number += 1
            place = f"row {number:,}"
            while True:
                try:
                    value, end = decoder.raw_decode(buffer.text, buffer.position)
                    break
                except (json.JSONDecodeError, RecursionError) as error:
                    if not buffer.grow():
                        text = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                        yield BadRow(place, f"not valid JSON: {text}; the rest of the file cannot be read")
                        return
            yield _object_row(value, place)
            buffer.position = end
            if not buffer.at("]") and not buffer.skip(","):
                yield BadRow(
                    place, "a comma or the closing ']' is missing after it; the rest of the file cannot be read"
                )
                return


class _Buffer:
    """A window on the text of a file; `position` is where reading stands."""

    def __init__(self, file: BinaryIO, uri: str, advance: Advance) -> None:
        self.text = ""
        self.position = 0
        self._file = file
        self._uri = uri
        self._advance = advance
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def grow(self) -> bool:
        """Drop what was read and double the rest; False at the end of the file or when a row would be too long."""
        self.text, self.position = self.text[self.position :], 0
        if len(self.text) > MAX_ROW_BYTES:
            return False
        data = self._file.read(max(CHUNK_BYTES, len(self.text)))
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(self._uri, None, error) from None
        self._advance(len(data))
        return bool(data)

    def at(self, token: str) -> bool:
        """Pass over white space and tell whether `token` is next; it stays."""
        self._pass_space()
        while self.position == len(self.text) and self.grow():
            self._pass_space()
        return self.text.startswith(token, self.position)

    def skip(self, token: str) -> bool:
        """Pass over `token` if it is next, and the white space around it."""
        found = self.at(token)
        if found:
            self.position += 1
            self.at(token)
        return found

    def _pass_space(self) -> None:
        match = _SPACE.match(self.text, self.position)
        self.position = match.end() if match else self.position


def _read_csv(path: Path, uri: str, advance: Advance) -> Iterator[Row | BadRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with path.open("rb") as file:
        reader = csv.reader((line for _, line in _lines(file, uri, advance)), strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise InvalidData(f"{uri}: not valid csv near line {reader.line_num:,}: {error}") from None
        _check_header(header, uri)
        number = 0
        while True:
            number += 1
            place = f"row {number:,}"
            try:
                record = next(reader, None)
            except csv.Error as error:
                text = f"not valid csv near line {reader.line_num:,}: {error}"
                yield BadRow(place, f"{text}; the rest of the file cannot be read")
                return
            if record is None:
                return
            if len(record) == len(header):
                yield Row(place, dict(zip(header, record, strict=True)))
            elif record:
                yield BadRow(place, f"has {len(record)} columns, the header has {len(header)}: quote texts with commas")


def _check_header(header: list[str], uri: str) -> None:
    if any(not name.strip() for name in header):
        raise InvalidData(f"{uri}: line 1: a column has no name; the first line must name the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InvalidData(f"{uri}: line 1: column {twice[0]!r} stands there twice")


def _read_parquet(path: Path, uri: str, advance: Advance) -> Iterator[Row | BadRow]:
    # Imported only here: 60 MB that a run on other files does not need.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number:,}", values)
                advance(int(share * batch.num_rows))
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidData(f"{uri}: not a readable parquet file: {str(error)[:300]}") from None


def _lines(file: BinaryIO, uri: str, advance: Advance) -> Iterator[tuple[int, str]]:
    """Yield numbered lines as text.

    Raises:
        InvalidData: A line is not UTF-8 or longer than any row.
    """
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        advance(len(line))
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) >= MAX_ROW_BYTES:
            raise InvalidData(f"{uri}: line {number:,} is longer than {MAX_ROW_BYTES >> 20} MiB")
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(uri, number, error) from None


def _not_utf8(uri: str, line: int | None, error: UnicodeDecodeError) -> InvalidData:
    place = f"{uri}: line {line:,}" if line else uri
    if line in (1, None) and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return InvalidData(f"{place}: the text is UTF-16: save the file as UTF-8")
    byte = error.object[error.start]
    return InvalidData(f"{place}: byte 0x{byte:02x} at position {error.start + 1} is not UTF-8: save the file as UTF-8")


def kind_of(value: Any) -> str:
    """Name the kind of a JSON value for people."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    kinds: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of type {type(value).__name__}")
