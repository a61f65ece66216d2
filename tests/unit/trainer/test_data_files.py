"""Reading rows out of files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tunewright_trainer import data_files
from tunewright_trainer.data_files import BadRow, Row, read_rows
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.transfer import ignore


def read(path: Path) -> list[Row | BadRow]:
    """Read a file under the URI s3://data/<name>."""
    return list(read_rows(path, f"s3://data/{path.name}", ignore))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """Make a file."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"a": "x"}\n\n{"a": "y"}\n', "line 3"),
        ("bom.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}', "line 2"),
        ("a.json", '[{"a": "x"},\n {"a": "y"}]\n', "row 2"),
        ("bom.json", b'\xef\xbb\xbf[{"a": "x"},{"a": "y"}]', "row 2"),
        ("lines.json", '{"a": "x"}\n{"a": "y"}', "line 2"),
        ("a.csv", 'a\nx\n"y"\n', "row 2"),
        ("bom.csv", b"\xef\xbb\xbfa\r\nx\r\ny\r\n", "row 2"),
        ("UPPER.JSONL", '{"a": "x"}\n{"a": "y"}\n', "line 2"),
    ],
)
def test_reads_rows_with_their_place(tmp_path: Path, name: str, content: str | bytes, place: str) -> None:
    """Every kind of file gives the same rows, each with the place that an editor or a script finds it by."""
    rows = read(write(tmp_path, name, content))
    assert rows[0] == Row(rows[0].place, {"a": "x"})
    assert rows[1:] == [Row(place, {"a": "y"})]


def test_reads_parquet(tmp_path: Path) -> None:
    """Parquet rows keep nested lists, as chats need them."""
    import pyarrow
    import pyarrow.parquet

    values = {"messages": [{"role": "user", "content": "hi"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([values] * 3), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Row(f"row {n}", values) for n in (1, 2, 3)]


def test_a_csv_field_may_span_lines(tmp_path: Path) -> None:
    """A quoted line break belongs to the field."""
    rows = read(write(tmp_path, "a.csv", 'a,b\n"one\ntwo, three",x\n'))
    assert rows == [Row("row 1", {"a": "one\ntwo, three", "b": "x"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', "line 2: not valid JSON: Expecting value at character 7"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', "line 2: must be a JSON object with named fields, is a list"),
        ("a.json", '[{"a": 1}, "b"]', "row 2: must be a JSON object with named fields, is a string"),
        ("a.json", '[{"a": 1}, {"a": "b]', "row 2: not valid JSON: Unterminated string starting at"),
        ("a.json", '[{"a": 1} {"a": 2}]', "row 1: a comma or the closing ']' is missing after it"),
        ("a.json", '[{"a": 1},', "row 2: not valid JSON: Expecting value"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "row 2: has 3 columns, the header has 2: quote texts with commas"),
        ("a.csv", 'a,b\n1,"2\n', "row 1: not valid csv near line 2: unexpected end of data"),
    ],
)
def test_names_a_broken_row(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A row that cannot be read stands in its place among the others, with the cause."""
    bad = [row for row in read(write(tmp_path, name, content)) if isinstance(row, BadRow)]
    assert len(bad) == 1
    assert f"{bad[0].place}: {bad[0].message}".startswith(message)


def test_finds_the_broken_line_4711(tmp_path: Path) -> None:
    """The number of a bad line in a long file is right."""
    lines = ['{"prompt": "p", "completion": "c"}'] * 6000
    lines[4710] = lines[4710][:-1]
    bad = [row for row in read(write(tmp_path, "a.jsonl", "\n".join(lines))) if isinstance(row, BadRow)]
    assert [row.place for row in bad] == ["line 4,711"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "files of kind '.txt' are not read: use .jsonl, .json, .csv or .parquet"),
        ("a.jsonl", "", "the file is empty (0 bytes)"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xe4"}\n', "line 2: byte 0xe4 at position 8 is not UTF-8: save the file as"),
        ("a.csv", b"a\nx\n\xff\n", "line 3: byte 0xff at position 1 is not UTF-8"),
        ("a.json", b'[{"a": "\xe4"}]', "byte 0xe4 at position 9 is not UTF-8"),
        ("a.jsonl", '{"a": "x"}\n'.encode("utf-16"), "line 1: the text is UTF-16: save the file as UTF-8"),
        ("a.csv", "a,,b\n1,2,3\n", "line 1: a column has no name"),
        ("a.csv", "a,a\n1,2\n", "line 1: column 'a' stands there twice"),
        ("a.parquet", "nonsense", "not a readable parquet file"),
    ],
)
def test_refuses_an_unusable_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """A file that is unusable as a whole is an error of its own that names the file."""
    path = write(tmp_path, name, content)
    with pytest.raises(InvalidData) as caught:
        read(path)
    assert str(caught.value).startswith(f"s3://data/{name}")
    assert message in str(caught.value)


def test_refuses_a_truncated_parquet_file(tmp_path: Path) -> None:
    """Half a parquet file is named as unreadable."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 100] * 1000}), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InvalidData, match="not a readable parquet file"):
        read(path)


def test_a_line_longer_than_any_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without line breaks does not end up in memory."""
    monkeypatch.setattr(data_files, "MAX_ROW_BYTES", 1000)
    with pytest.raises(InvalidData, match="line 1 is longer than"):
        read(write(tmp_path, "a.jsonl", "x" * 5000))


def test_an_array_is_the_same_in_any_chunking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an array come out whole wherever the reads cut it, escapes and multi-byte characters included."""
    generator = random.Random(1)
    rows = [{"n": n, "t": "".join(generator.choices('ä€𝄞\\"[]{},: ab', k=n % 37))} for n in range(200)]
    path = write(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False, indent=1))
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(data_files, "CHUNK_BYTES", size)
        assert [row.values for row in read(path) if isinstance(row, Row)] == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_reports_every_byte_read(tmp_path: Path, name: str) -> None:
    """Progress adds up to the size of the file."""
    contents = {"a.jsonl": '{"a": "ä"}\n' * 500, "a.json": json.dumps([{"a": "ä"}] * 500), "a.csv": "a\n" + "ä\n" * 500}
    path = write(tmp_path, name, contents[name])
    sizes: list[int] = []
    assert len(list(read_rows(path, path.name, sizes.append))) == 500
    assert sum(sizes) == path.stat().st_size
