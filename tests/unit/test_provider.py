"""The choice of a cluster for the demo, with stand-ins for `docker` and `kind`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import provider


def program(folder: Path, name: str, script: str) -> None:
    """Put a shell script on the PATH that writes down how it was called."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{script}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(("status", "runs"), [(0, True), (1, False)])
def test_docker_counts_only_with_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, runs: bool
) -> None:
    """A Docker client without an engine does not make the demo use kind."""
    program(tmp_path, "docker", f"exit {status}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert provider.docker_runs() is runs
    assert (tmp_path / "calls").read_text() == "docker info\n"


def test_context_without_a_registry_names_what_is_missing() -> None:
    """A context alone is not enough: its nodes must find images and an S3 server."""
    environment = {"DEMO_CONTEXT": "lab", "DEMO_S3_ENDPOINT": "http://10.0.0.1:9000", "AWS_ACCESS_KEY_ID": "a"}
    with pytest.raises(ValueError, match="DEMO_CONTEXT needs DEMO_REGISTRY, AWS_SECRET_ACCESS_KEY as well"):
        provider.context(environment)
