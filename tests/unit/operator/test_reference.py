"""The page with settings and metrics is the one that the code generates."""

from __future__ import annotations

from pathlib import Path

from tunewright_operator import reference


def test_the_committed_page_is_up_to_date() -> None:
    """A setting or metric that is added or reworded changes the page."""
    page = Path(__file__).parents[3] / reference.PATH
    assert page.read_text() == reference.render(), "run `python -m tunewright_operator.reference --write`"
