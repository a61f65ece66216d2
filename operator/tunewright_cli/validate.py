"""`tunewright validate`: all problems of all FineTuneJobs and AdapterMerges in files, each with its place."""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer

from tunewright_api.exit_codes import ExitCode
from tunewright_cli.documents import KINDS, CheckedDocument, check_file, expand
from tunewright_cli.errors import InvalidFile


def run(names: Sequence[str], *, as_json: bool) -> int:
    """Print the verdict on every document and return the exit code: 0, or 20 when something is wrong.

    Raises:
        InvalidFile: A file cannot be read, is not YAML, or there is nothing to check in any of them.
    """
    documents = [document for file in expand(names) for document in check_file(file)]
    if not any(d.kind in KINDS or d.problems for d in documents):
        raise InvalidFile(f"no {' or '.join(KINDS)} in {', '.join(names)}")
    if as_json:
        typer.echo(json.dumps(_report(documents), indent=2))
    else:
        for document in documents:
            _print(document)
    return ExitCode.INVALID_INPUT if any(d.problems for d in documents) else ExitCode.SUCCESS


def _print(document: CheckedDocument) -> None:
    for problem in document.problems:
        typer.echo(str(problem))
    if document.job is not None:
        typer.echo(f"{document.file}: {document.kind} {document.name} is valid")
    elif not document.problems:
        typer.echo(f"{document.file}: {document.kind} {document.name} is not looked at")


def _report(documents: Sequence[CheckedDocument]) -> dict[str, object]:
    return {
        "valid": not any(d.problems for d in documents),
        "documents": [
            {
                "file": d.file,
                "kind": d.kind,
                "name": d.name,
                "checked": d.job is not None or bool(d.problems),
                "problems": [
                    {
                        "path": p.problem.path,
                        "line": p.position.line,
                        "column": p.position.column,
                        "message": p.problem.message,
                    }
                    for p in d.problems
                ],
            }
            for d in documents
        ],
    }
