"""FineTuneJobs and AdapterMerges in files: read as kubectl reads them, checked, every problem with its place."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright_api import API_VERSION, GROUP
from tunewright_api.v1alpha1.adaptermerge import KIND as MERGE_KIND
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge
from tunewright_api.v1alpha1.finetunejob import KIND, FineTuneJob
from tunewright_api.validation import InvalidDocument, Problem, parse_adaptermerge, parse_finetunejob
from tunewright_cli.errors import InvalidArgument, InvalidFile
from tunewright_cli.kubectl_yaml import Document, Position, read_documents

KINDS = (KIND, MERGE_KIND)
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class LocatedProblem:
    """A problem and the place in the file that it is about."""

    file: str
    position: Position
    problem: Problem

    def __str__(self) -> str:
        """Return the problem as one line, in the form that editors turn into a link."""
        return f"{self.file}:{self.position.line}:{self.position.column}: {self.problem}"


@dataclass(frozen=True)
class CheckedDocument:
    """One document of a file after the check. `job` is there when there are no problems."""

    file: str
    kind: str
    name: str
    problems: tuple[LocatedProblem, ...]
    job: FineTuneJob | AdapterMerge | None


def expand(names: Sequence[str]) -> list[str]:
    """Return the files behind the arguments of `-f`, a folder standing for the YAML and JSON files in it.

    Raises:
        InvalidFile: A folder without such files.
    """
    files = []
    for name in names:
        if name != "-" and Path(name).is_dir():
            inside = sorted(str(p) for p in Path(name).iterdir() if p.suffix in _SUFFIXES)
            if not inside:
                raise InvalidFile(f"{name}: no {', '.join(_SUFFIXES)} file in this folder")
            files += inside
        else:
            files.append(name)
    return files


def check_file(name: str, *, local: bool = False) -> Iterator[CheckedDocument]:
    """Yield what the check of each document of a file gave; objects of other API groups pass unchecked.

    Args:
        name: File, or `-` for stdin.
        local: Accept local paths where URIs stand.

    Raises:
        InvalidFile: The file cannot be read, or is not YAML.
    """
    shown = "<stdin>" if name == "-" else name
    for document in read_documents(read_text(name), shown):
        yield _check(document, shown, local=local)


def load_any(file: str, wanted: str | None, *, local: bool) -> FineTuneJob | AdapterMerge:
    """Return the only FineTuneJob or AdapterMerge of a file, or the one called `wanted`.

    Args:
        file: File, or `-` for stdin.
        wanted: A name, or KIND/NAME where a FineTuneJob and an AdapterMerge share it.
        local: Accept local paths where URIs stand.

    Raises:
        InvalidFile: None there, or an invalid one; the message holds all its problems.
        InvalidArgument: Several, and none is named, or none has that name.
    """
    found = [d for d in check_file(file, local=local) if d.kind in KINDS]
    what = " or ".join(KINDS)
    if not found:
        raise InvalidFile(f"{file}: no {what} in this file")
    if wanted is not None:
        found = [
            d for d in found if wanted in (d.name, f"{d.kind}/{d.name}", f"{d.kind.lower()}/{d.name}")
        ] or _none_called(wanted, file, what, found)
    if len(found) > 1:
        # By kind, too, where the names alone would not tell them apart.
        is_one_kind = len({d.kind for d in found}) == 1
        names = ", ".join(d.name if is_one_kind else f"{d.kind}/{d.name}" for d in found)
        plural = f"{found[0].kind}s" if is_one_kind else "objects to run"
        raise InvalidArgument(f"{file} holds {len(found)} {plural}: choose one with --name ({names})")
    chosen = found[0]
    if chosen.job is None:
        raise InvalidFile(f"invalid {chosen.kind}\n" + "\n".join(str(p) for p in chosen.problems))
    return chosen.job


def _none_called(wanted: str, file: str, what: str, found: Sequence[CheckedDocument]) -> list[CheckedDocument]:
    raise InvalidArgument(f"{file} holds no {what} {wanted!r}: there are {', '.join(d.name for d in found)}")


def read_text(name: str) -> str:
    """Return the content of a file, or of stdin for `-`.

    Raises:
        InvalidFile: It cannot be read.
    """
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidFile(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidFile(f"{name}: not UTF-8 text (byte {error.start})") from None


def _check(document: Document, file: str, *, local: bool) -> CheckedDocument:
    content = document.content
    if not isinstance(content, dict):
        problems = [Problem("", f"a Kubernetes object must be a mapping, not {type(content).__name__}")]
        return _checked(document, file, "?", "?", problems, None)
    kind, name = str(content.get("kind", "?")), _name(content)
    api_version = content.get("apiVersion")
    problems = [Problem(key, "required, but missing") for key in ("apiVersion", "kind") if not content.get(key)]
    if not problems and str(api_version).split("/")[0] != GROUP and kind not in KINDS:
        return _checked(document, file, kind, name, [], None)
    if api_version and api_version != API_VERSION:
        problems.append(Problem("apiVersion", f"{api_version!r} is not served: use {API_VERSION}"))
    if content.get("kind") and kind not in KINDS:
        problems.append(Problem("kind", f"{kind!r} is not a kind of {GROUP}: use {' or '.join(KINDS)}"))
    if problems:
        return _checked(document, file, kind, name, problems, None)
    try:
        parse = parse_adaptermerge if kind == MERGE_KIND else parse_finetunejob
        return _checked(document, file, kind, name, [], parse(content, local=local))
    except InvalidDocument as error:
        return _checked(document, file, kind, name, error.problems, None)


def _checked(
    document: Document,
    file: str,
    kind: str,
    name: str,
    problems: Sequence[Problem],
    job: FineTuneJob | AdapterMerge | None,
) -> CheckedDocument:
    located = sorted(
        (LocatedProblem(file, document.position(p.path), p) for p in problems),
        key=lambda p: (p.position.line, p.position.column),
    )
    return CheckedDocument(file, kind, name, tuple(located), job)


def _name(content: dict[str, Any]) -> str:
    metadata = content.get("metadata")
    return str(metadata.get("name", "?")) if isinstance(metadata, dict) else "?"
