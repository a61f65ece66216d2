"""The documentation is true: YAML parses, commands and options exist, links lead somewhere, no failure is left out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from tunewright_api.conditions import Reason
from tunewright_api.exit_codes import OUTCOMES, Fate
from tunewright_api.validation import parse_adaptermerge, parse_finetunejob
from tunewright_cli.kubectl_yaml import read_documents
from tunewright_cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
_COMMAND = re.compile(
    r"(?:^|[`$&] *)(?:kubectl )?(tunewright (?:validate|plan|convert|run|watch|get-adapter|chat|verify)[^`\n#&]*)",
    re.MULTILINE,
)


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the code blocks of a page in a language."""
    for found, text in _BLOCK.findall(page.read_text()):
        if found == language:
            yield text


def names(pages: list[Path]) -> list[str]:
    """Return the pages as test ids."""
    return [str(page.relative_to(ROOT)) for page in pages]


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_finetunejobs_to_check() -> None:
    """README and user guide show one each."""
    for page in (ROOT / "README.md", ROOT / "docs" / "user-guide.md"):
        assert [text for text in blocks(page, "yaml") if "kind: FineTuneJob" in text]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_finetunejob_in_the_text_is_valid(page: Path) -> None:
    """What people copy works."""
    for text in blocks(page, "yaml"):
        for document in read_documents(text, page.name):
            if document.content.get("kind") == "FineTuneJob":
                parse_finetunejob(document.content)
            if document.content.get("kind") == "AdapterMerge":
                parse_adaptermerge(document.content)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_command_in_the_text_exists_with_its_options(page: Path) -> None:
    """No page names a command or an option that is gone."""
    group = typer.main.get_command(app)
    for line in _COMMAND.findall(page.read_text()):
        _, name, *arguments = shlex.split(line)
        command = group.commands[name]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        given = {argument.split("=")[0] for argument in arguments if argument.startswith("-") and argument != "-"}
        assert given <= known, line


def test_commands_are_found_in_the_text() -> None:
    """The pattern sees the user guide's commands, plain and under kubectl."""
    found = {shlex.split(line)[1] for line in _COMMAND.findall((ROOT / "docs" / "user-guide.md").read_text())}
    assert found == {"validate", "plan", "convert", "run", "watch", "get-adapter", "chat", "verify"}
    assert len(_COMMAND.findall((ROOT / "README.md").read_text())) == 4


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files exist, anchors are headings of their page."""
    for link in _LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_make_target_in_the_text_exists(page: Path) -> None:
    """`make X` in a code block or in backticks is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", page.read_text(), re.MULTILINE)) <= targets


def test_the_user_guide_explains_every_failure() -> None:
    """Whatever reason a failed run can have is in the table."""
    text = (ROOT / "docs" / "user-guide.md").read_text()
    table = text.split("## When it fails")[1].split("\n## ")[0]
    of_trainer = {outcome.reason for outcome in OUTCOMES.values() if outcome.fate is not Fate.SUCCEEDED}
    healthy = {
        Reason.PENDING, Reason.VALIDATED, Reason.NOT_SUSPENDED, Reason.USER_SUSPENDED, Reason.RESUMED, Reason.STARTED,
        Reason.WAITING_FOR_PODS, Reason.ALL_READY, Reason.RESTARTING, Reason.IN_PROGRESS, Reason.SUCCEEDED,
        Reason.CACHED, Reason.EARLY_STOPPED, Reason.ARTIFACT_PUBLISHED, Reason.JOB_CREATED,
        Reason.WAITING_FOR_FINETUNEJOB, Reason.WAITING_FOR_ADAPTERMERGE,
    }  # fmt: skip
    of_operator = {reason.value for reason in set(Reason) - healthy}
    assert not {reason for reason in of_trainer | of_operator if f"`{reason}`" not in table}


def test_every_row_of_the_recipes_has_its_example_and_its_test() -> None:
    """Files and tests that the page names exist, and no example is left out of it."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    examples = set(re.findall(r"`([a-z0-9-]+\.yaml)`", text))
    runnable = {path.name for path in (ROOT / "examples").glob("*.yaml")} - {"secret.yaml", "quickstart-gpu.yaml"}
    assert examples == runnable
    for path, _, name in re.findall(r"`((?:e2e|trainer|unit|integration)/[\w/]+\.py)(::(\w+))?`", text):
        source = (ROOT / "tests" / path).read_text()
        assert not name or f"def {name}(" in source, name
