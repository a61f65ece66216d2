"""`tunewright convert`: an Axolotl configuration as a FineTuneJob, and what became of each of its keys."""

from __future__ import annotations

from pathlib import Path

import typer

from tunewright_cli.axolotl.convert import convert, job_name
from tunewright_cli.axolotl.draft import Note
from tunewright_cli.documents import read_text
from tunewright_cli.errors import InvalidArgument, InvalidFile
from tunewright_cli.kubectl_yaml import Document, read_documents, write_document


def run(file: str, name: str | None, output: Path | None) -> None:
    """Write the FineTuneJob, and the notes to stderr.

    Raises:
        InvalidFile: The file cannot be read, is no Axolotl configuration, or cannot be converted faithfully; the
            message holds all the reasons.
        InvalidArgument: `name` cannot be the name of a FineTuneJob, or `output` cannot be written.
    """
    shown = "<stdin>" if file == "-" else file
    documents = list(read_documents(read_text(file), shown))
    if len(documents) != 1 or not isinstance(documents[0].content, dict):
        raise InvalidFile(f"{shown}: not an Axolotl configuration, which is one mapping with base_model and datasets")
    document = documents[0]
    if name is not None and job_name(name) != name:
        raise InvalidArgument(f"--name {name}: use lower-case letters, digits and '-', such as {job_name(name)}")
    conversion = convert(document.content, name or job_name("axolotl" if file == "-" else Path(file).stem))
    if conversion.document is None:
        reasons = "\n".join(_line(note, document, shown) for note in conversion.errors)
        raise InvalidFile(f"cannot be converted\n{reasons}")
    for note in conversion.notes:
        typer.echo(_line(note, document, shown), err=True)
    _write(write_document(conversion.document), output)


def _line(note: Note, document: Document, shown: str) -> str:
    """Return a note in the form that editors turn into a link."""
    position = document.position(note.path)
    return f"{shown}:{position.line}:{position.column}: {note}"


def _write(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{output}: {error.strerror}") from None
