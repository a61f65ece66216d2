"""A spec as it grows out of an Axolotl configuration, and what there is to say about each of its keys."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_UNSET: tuple[Any, ...] = (None, "", {})
"""Values that stand for a key that is not there; Axolotl's own examples are full of them."""


class Kind(enum.StrEnum):
    """What is said about a key, in the order in which it is printed."""

    ERROR = "error"
    TO_DO = "to do"
    DIFFERS = "differs"
    NOT_CONVERTED = "not converted"
    NOT_NEEDED = "not needed"


@dataclass(frozen=True)
class Note:
    """One line about one key. `path` is where it stands, such as `datasets[0].type`; empty for the whole file."""

    kind: Kind
    path: str
    text: str

    def __str__(self) -> str:
        """Return kind, key and text in one line."""
        return ": ".join(part for part in (self.kind, self.path, self.text) if part)


class Keys:
    """The keys of a mapping. Each one is taken by what converts it; what is left over at the end is reported."""

    def __init__(self, values: Mapping[str, Any], path: str = "", notes: list[Note] | None = None) -> None:
        self._values = {key: value for key, value in values.items() if value not in _UNSET}
        self._path = path
        self._taken: set[str] = set()
        self.notes: list[Note] = [] if notes is None else notes

    def inside(self, key: str, values: Mapping[str, Any]) -> Keys:
        """Return the keys of a mapping below this one; its notes go to the same list."""
        return Keys(values, self.path_of(key), self.notes)

    def path_of(self, key: str) -> str:
        """Return where a key stands in the file; the empty key is the mapping itself."""
        return f"{self._path}.{key}".strip(".")

    def note(self, kind: Kind, key: str, text: str) -> None:
        """Say something about a key."""
        self.notes.append(Note(kind, self.path_of(key), text))

    def left(self) -> dict[str, Any]:
        """Return what nobody has taken."""
        return {key: value for key, value in self._values.items() if key not in self._taken}

    def value(self, key: str) -> Any:
        """Return a value without taking it, for what another key means beside it; None where the key is unset."""
        return self._values.get(key)

    def take(self, key: str) -> Any:
        """Return a value, None where the key is unset."""
        self._taken.add(key)
        return self._values.get(key)

    def take_text(self, key: str) -> str | None:
        """Return a text; None where the key is unset, or after a note that it is something else."""
        value = self.take(key)
        if value is None or isinstance(value, str):
            return value
        self.note(Kind.ERROR, key, f"must be text, is {value!r}")
        return None

    def take_flag(self, key: str) -> bool | None:
        """Return true or false; None where the key is unset, or after a note that it is something else."""
        value = self.take(key)
        if value is None or isinstance(value, bool):
            return value
        self.note(Kind.ERROR, key, f"must be true or false, is {value!r}")
        return None

    def take_texts(self, key: str) -> list[str]:
        """Return a list of texts, one text alone as a list of one; empty where unset, or after a note."""
        value = self.take(key)
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return values
        if value is not None:
            self.note(Kind.ERROR, key, f"must be a list of texts, is {value!r}")
        return []

    def take_mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping; an empty one where the key is unset, or after a note that it is something else."""
        value = self.take(key)
        if isinstance(value, dict):
            return value
        if value is not None:
            self.note(Kind.ERROR, key, f"must be a mapping, is {value!r}")
        return {}

    def take_number(self, key: str) -> int | float | None:
        """Return a number, which may be in quotes; None where the key is unset, or after a note that it is none."""
        value = self.take(key)
        try:
            if value is not None and not isinstance(value, bool):
                number = float(value)
                return int(number) if number.is_integer() else number
        except (TypeError, ValueError, OverflowError):
            pass
        if value is not None:
            self.note(Kind.ERROR, key, f"must be a number, is {value!r}")
        return None

    def take_whole(self, key: str) -> int | None:
        """Return a whole number; None where the key is unset, or after a note that it is none."""
        number = self.take_number(key)
        if number is None or isinstance(number, int):
            return number
        self.note(Kind.ERROR, key, f"must be a whole number, is {number!r}")
        return None


class Draft(Keys):
    """The configuration's keys, and the spec that is made of them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.spec: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        """Field of the spec -> key that it was made of."""

    def set(self, field: str, value: Any, key: str = "") -> None:
        """Set a field of the spec (`hyperparameters.learningRate`) unless the value is None.

        Args:
            field: Path below spec.
            value: Its value.
            key: The key it was made of; empty for a default of Axolotl's.
        """
        if value is None:
            return
        *parents, name = field.split(".")
        block = self.spec
        for parent in parents:
            block = block.setdefault(parent, {})
        block[name] = value
        self.origins[f"spec.{field}"] = key
