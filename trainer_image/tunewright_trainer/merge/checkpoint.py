"""A model's tensors by name, out of safetensors files, without loading the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tunewright_trainer.errors import InvalidModel, MissingFile
from tunewright_trainer.merge.numbers import ITEM_BYTES, Float32, from_bytes, to_float32
from tunewright_trainer.merge.readers import Reader
from tunewright_trainer.model_files import CONFIG, SHARD, WEIGHTS, WEIGHTS_INDEX, other_weights, parse_header

MAX_JSON_BYTES = 64 * 1024 * 1024
_HEADER_THREADS = 8


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and where its bytes are."""

    name: str
    dtype: str
    """As safetensors writes it: F32, F16, BF16, I64, U8, ..."""
    shape: tuple[int, ...]
    file: str
    start: int
    """Offset of the first byte in the file."""
    length: int
    """Bytes."""


class Checkpoint:
    """Configuration and tensors of a model folder. Safe to use from several threads."""

    def __init__(self, reader: Reader) -> None:
        """Read the configuration and the headers of all weight files, and compare them with index and file sizes.

        Raises:
            MissingFile: Nothing lies there.
            InvalidModel: No whole model in safetensors: a shard is missing or truncated, the weights are pickles, ...
        """
        self.reader = reader
        """Where the files come from."""
        if not reader.files:
            raise MissingFile(f"{reader.uri}: no files are there")
        if CONFIG not in reader.files:
            raise InvalidModel(f"{reader.uri}: no {CONFIG}: this is not the folder of a model")
        self.config: dict[str, Any] = read_object(reader, CONFIG)
        """Content of config.json."""
        index = read_object(reader, WEIGHTS_INDEX).get("weight_map") if WEIGHTS_INDEX in reader.files else None
        self.tensors: Mapping[str, Tensor] = _read_headers(reader, _weight_files(reader, index))
        """All tensors by name, in the order of the files."""
        for name, file in (index or {}).items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise InvalidModel(f"{reader.uri}/{WEIGHTS_INDEX}: names tensor {name}, which {file} does not have")

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """Return a tensor, or some rows of its first dimension, in its own format; BF16 as uint16.

        Args:
            name: Of the tensor.
            rows: Step 1. Default: all.
        """
        return read_tensor(self.reader, self.tensors[name], rows)

    def read_float32(self, name: str, rows: slice | None = None) -> Float32:
        """Return a tensor of floats, or some rows of it, as float32."""
        return to_float32(self.read(name, rows), self.tensors[name].dtype)


def read_tensor(reader: Reader, tensor: Tensor, rows: slice | None = None) -> NDArray[Any]:
    """Return a tensor, or some rows of it, in its own format; BF16 as uint16."""
    shape, start, length = tensor.shape, tensor.start, tensor.length
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        row_bytes = length // max(1, shape[0])
        shape, start, length = (last - first, *shape[1:]), start + first * row_bytes, (last - first) * row_bytes
    return from_bytes(reader.read(tensor.file, start, length), tensor.dtype).reshape(shape)


def read_object(reader: Reader, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidModel: It is none.
    """
    size = reader.files[name]
    if size > MAX_JSON_BYTES:
        raise InvalidModel(f"{reader.uri}/{name}: {size} bytes, which no such file has")
    try:
        document = json.loads(reader.read(name, 0, size))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{reader.uri}/{name}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidModel(f"{reader.uri}/{name}: must be a JSON object")
    return document


def read_tensors(reader: Reader, file: str) -> dict[str, Tensor]:
    """Read the header of a safetensors file and check that every tensor lies where its shape says.

    Raises:
        InvalidModel: What is wrong.
    """
    place = f"{reader.uri}/{file}"
    entries, data = parse_header(place, reader.files[file], lambda start, length: reader.read(file, start, length))
    tensors, expected = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        tensors[name] = _tensor(place, file, name, entry, data)
        if entry["data_offsets"][0] != expected:
            raise InvalidModel(f"{place}: the safetensors header is damaged: {name} does not follow its predecessor")
        expected = entry["data_offsets"][1]
    return tensors


def _tensor(place: str, file: str, name: str, entry: dict[str, Any], data: int) -> Tensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, end = (int(n) for n in entry["data_offsets"])
    except (ValueError, TypeError, KeyError):
        raise InvalidModel(f"{place}: the safetensors header is damaged at tensor {name}") from None
    if dtype not in ITEM_BYTES:
        raise InvalidModel(f"{place}: tensor {name} has number format {dtype!r}, which is not known")
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise InvalidModel(f"{place}: tensor {name} has {end - start} bytes, which is no {dtype} of shape {shape}")
    return Tensor(name, dtype, shape, file, data + start, end - start)


def _weight_files(reader: Reader, index: object) -> Sequence[str]:
    if WEIGHTS_INDEX not in reader.files:
        if WEIGHTS not in reader.files:
            raise InvalidModel(f"{reader.uri}: no {WEIGHTS}: {other_weights(reader.files)}")
        return [WEIGHTS]
    if not isinstance(index, dict) or not index:
        raise InvalidModel(f"{reader.uri}/{WEIGHTS_INDEX}: no weight_map")
    names = sorted({str(name) for name in index.values()})
    strange = [name for name in names if not SHARD.match(name) or "/" in name or "\\" in name]
    if strange:
        raise InvalidModel(
            f"{reader.uri}/{WEIGHTS_INDEX}: names {strange[0]}, which is no model-*.safetensors beside it"
        )
    missing = [name for name in names if name not in reader.files]
    if missing:
        raise InvalidModel(
            f"{reader.uri}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:8])}"
        )
    return names


def _read_headers(reader: Reader, files: Sequence[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_HEADER_THREADS, "headers") as pool:
        for found in pool.map(lambda file: read_tensors(reader, file), files):
            for name, tensor in found.items():
                if name in tensors:
                    raise InvalidModel(f"{reader.uri}: both {tensors[name].file} and {tensor.file} have tensor {name}")
                tensors[name] = tensor
    return tensors
