"""Read YAML as kubectl reads it, and remember where every field stands; write what kubectl reads back the same.

PyYAML follows YAML 1.1 to the letter, where `2e-4` is a string; kubectl's Go reader takes it for a number. Here the
rules are those of go.yaml.in/yaml/v2 (`resolve.go`), which is what kubectl uses: booleans of YAML 1.1, integers in all
of Go's notations, floats with or without a dot or a sign in the exponent, dates as strings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from tunewright_cli.errors import InvalidFile

_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED = re.compile(r"([-+]?)0([xX][0-9a-fA-F]+|[oO]?[0-7]+|[bB][01]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BASES = {"x": 16, "o": 8, "b": 2}
_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1

_SHORTEST_EXPONENT = 1e21
"""Go writes smaller numbers without an exponent in JSON."""

_LINE = 110
"""Characters of a written line; longer text becomes a block."""

_PLAIN = "plain"
"""Tag of a scalar written without quotes and without a tag of its own."""


@dataclass(frozen=True)
class Position:
    """Place in a file, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """One YAML document and the place of each of its fields, by path (`spec.dataset.train[0].uri`)."""

    content: Any
    positions: dict[str, Position] = field(repr=False)

    def position(self, path: str) -> Position:
        """Return where a field stands; for one that is not there, where the part around it stands."""
        while path not in self.positions:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.positions[path]


class _Loader(yaml.BaseLoader):
    """Marks plain scalars, so that only those are resolved."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


def read_documents(text: str, name: str) -> Iterator[Document]:
    """Yield every document of a file that is not empty.

    Args:
        text: Content of the file.
        name: Its name, for messages.

    Raises:
        InvalidFile: Broken YAML, a key twice in one mapping, an anchor that contains itself.
    """
    try:
        for node in yaml.compose_all(text, Loader=_Loader):
            if node is None:
                continue
            builder = _Builder(name)
            content = builder.build(node, "", ())
            if content is not None:
                yield Document(content, builder.positions)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InvalidFile(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InvalidFile(f"{name}: not valid YAML: {error}") from None


class _Dumper(yaml.SafeDumper):
    """Quotes text that kubectl would take for something else, and writes long text as a block."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # list items stand below their key, as in our examples

    def represent_text(self, text: str) -> yaml.Node:
        is_long = "\n" in text or len(text) > _LINE
        style = "|" if is_long else None if isinstance(_scalar(text), str) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def represent_number(self, number: float) -> yaml.Node:
        return self.represent_int(int(number)) if number.is_integer() else self.represent_float(number)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(float, _Dumper.represent_number)


def write_document(content: Any) -> str:
    """Return YAML that kubectl and PyYAML both read as `content`, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_LINE)


class _Builder:
    def __init__(self, name: str) -> None:
        self._name = name
        self.positions: dict[str, Position] = {}

    def build(self, node: yaml.Node, path: str, ancestors: tuple[yaml.Node, ...]) -> Any:
        self.positions.setdefault(path, _position(node))
        if any(node is ancestor for ancestor in ancestors):
            raise InvalidFile(f"{self._place(node)}: an anchor may not contain itself")
        inside = (*ancestors, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, inside)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, f"{path}[{index}]", inside) for index, item in enumerate(node.value)]
        return _scalar(node.value) if node.tag == _PLAIN else node.value

    def _mapping(self, node: yaml.MappingNode, path: str, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _PLAIN and key_node.value == "<<":
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in reversed(sources):
                    merged.update(self.build(source, path, inside))
                continue
            key = self._key(key_node)
            if key in result:
                raise InvalidFile(f"{self._place(key_node)}: the key {key!r} stands here for the second time")
            field_path = f"{path}.{key}".removeprefix(".")
            # The field's own place wins over that of a value merged in from an anchor.
            self.positions[field_path] = _position(key_node)
            result[key] = self.build(value_node, field_path, inside)
        return {**merged, **result}

    def _key(self, node: yaml.Node) -> str:
        key = _scalar(node.value) if isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN else node.value
        if isinstance(key, bool):
            return "true" if key else "false"
        if not isinstance(key, str | int | float):
            raise InvalidFile(f"{self._place(node)}: a key must be text")
        return str(key)

    def _place(self, node: yaml.Node) -> str:
        position = _position(node)
        return f"{self._name}:{position.line}:{position.column}"


def _position(node: yaml.Node) -> Position:
    return Position(node.start_mark.line + 1, node.start_mark.column + 1)


def _scalar(text: str) -> Any:
    """Return the value that Go's reader takes a plain scalar for."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] not in "0123456789+-.":
        return text
    plain = text.replace("_", "") if text[0] != "." else text
    if _DECIMAL.fullmatch(plain) and _INT64_MIN <= int(plain) <= _UINT64_MAX:
        return int(plain)
    if based := _BASED.fullmatch(plain):
        sign, digits = based.groups()
        return int(sign + digits.lstrip("xXoObB"), _BASES.get(digits[0].lower(), 8))
    return _float(plain, text) if _FLOAT.fullmatch(plain) else text


def _float(plain: str, text: str) -> Any:
    number = float(plain)
    if not math.isfinite(number):
        return text
    # kubectl sends JSON, and Go writes 1e5 there as 100000: an integer field takes it.
    return int(number) if number.is_integer() and abs(number) < _SHORTEST_EXPONENT else number
