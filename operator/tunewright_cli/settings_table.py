"""What `tunewright plan` shows of either kind: resolved settings, and what is created for the first attempt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One resolved field. `given` tells whether the spec has it; otherwise it is a default."""

    path: str
    value: Any
    given: bool

    @property
    def origin(self) -> str:
        """The same in a word."""
        return "given" if self.given else "default"

    def document(self) -> dict[str, Any]:
        """Return the setting as JSON and YAML have it."""
        return {"field": self.path, "value": self.value, "from": self.origin}


def settings_of(
    resolved: Mapping[str, Any], written: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]]
) -> Iterator[Setting]:
    """Yield every resolved setting of a run with its place in the spec.

    Args:
        resolved: A run document.
        written: What the spec says, without defaults.
        parts: The parts of the run document that carry defaults, with the place of the same part in the spec.
    """
    for part, place in parts.items():
        given: Mapping[str, Any] = written
        for name in place:
            given = given.get(name) or {}
        for name, value in (resolved.get(part) or {}).items():
            yield Setting(".".join((*place, name)), value, given.get(name) is not None)


def print_settings(console: Console, settings: list[Setting]) -> None:
    """Print one line per setting, defaults in grey."""
    table = Table(box=None, pad_edge=False)
    table.add_column("FIELD", no_wrap=True, min_width=max(len(setting.path) for setting in settings))
    table.add_column("VALUE", overflow="fold")
    table.add_column("FROM")
    for setting in settings:
        table.add_row(setting.path, _shown(setting.value), setting.origin, style=None if setting.given else "dim")
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


def print_manifests(console: Console, manifests: Mapping[str, Manifest]) -> None:
    """Print what is created for the first attempt, by kind and in the order of creation."""
    if not manifests:
        console.print("\nNo Job: local paths are only for `tunewright run`.")
        return
    console.print(f"\n{' and '.join(manifests)} that the operator creates for the first attempt:\n")
    typer.echo(yaml.safe_dump_all(manifests.values(), sort_keys=False, width=110), nl=False)


def print_document(document: Mapping[str, Any], output: str) -> None:
    """Print a plan for scripts, as `json` or `yaml`."""
    text = json.dumps(document, indent=2) if output == "json" else yaml.safe_dump(document, sort_keys=False, width=110)
    typer.echo(text.rstrip("\n"))
