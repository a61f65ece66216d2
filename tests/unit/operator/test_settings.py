"""Settings from the environment, each documented."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tunewright_operator.settings import Settings


def test_defaults() -> None:
    """Without any variable the operator serves all namespaces, with the trainer of its own version."""
    settings = Settings()
    assert settings.watch_namespaces == ()
    assert settings.trainer_image.startswith("tunewright/trainer:")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values come from TUNEWRIGHT_ variables; namespaces are separated by commas; empty means unset."""
    monkeypatch.setenv("TUNEWRIGHT_WATCH_NAMESPACES", "team-a, team-b,")
    monkeypatch.setenv("TUNEWRIGHT_STORAGE_PATH_STYLE", "true")
    monkeypatch.setenv("TUNEWRIGHT_STORAGE_ENDPOINT", "")
    monkeypatch.setenv("TUNEWRIGHT_CONCURRENCY", "4")
    settings = Settings()
    assert settings.watch_namespaces == ("team-a", "team-b")
    assert (settings.storage.path_style, settings.storage.endpoint, settings.concurrency) == (True, None, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("CONCURRENCY", "0"), ("DEFAULT_MEMORY", "16 GB"), ("LOG_LEVEL", "loud"), ("RESYNC_SECONDS", "0"), ("PORT", "x")],
)
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A wrong value stops the operator at its start, with the field's name."""
    monkeypatch.setenv(f"TUNEWRIGHT_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_every_setting_is_documented() -> None:
    """Each field says what it is and why it has its default; times say that they are seconds."""
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert ("_seconds" in name) <= ("econds" in field.description), name
