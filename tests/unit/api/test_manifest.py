"""Manifests: what may stand in them."""

from __future__ import annotations

import hashlib

import pytest
from pydantic import ValidationError

from tunewright_api.manifest import Manifest, ManifestFile, digest_of

SHA = "0" * 64


@pytest.mark.parametrize("path", ["adapter/adapter_model.safetensors", "0a1b2c3d/run.json", "a", "a..b/c", ".hidden"])
def test_paths_inside_the_folder_pass(path: str) -> None:
    """Any plain relative path is fine."""
    assert ManifestFile(path=path, bytes=1, sha256=SHA).path == path


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../other/file", "a/../../b", "a/..", "..", "a//b", "./a", "a/", "a\\b", "..\\a", "C:\\a", "", "."],
)
def test_paths_that_could_leave_the_folder_are_refused(path: str) -> None:
    """A manifest is data from a bucket; a download may write only below its target."""
    with pytest.raises(ValidationError):
        ManifestFile(path=path, bytes=1, sha256=SHA)


@pytest.mark.parametrize(("size", "sha256"), [(-1, SHA), (1, "0" * 63), (1, "G" * 64), (1, "A" * 64)])
def test_sizes_and_hashes_have_one_form(size: int, sha256: str) -> None:
    """A hash is 64 lower-case hex digits, a size is not negative."""
    with pytest.raises(ValidationError):
        ManifestFile(path="a", bytes=size, sha256=sha256)


def test_a_manifest_reads_back_and_sums_up() -> None:
    """Stored bytes give the same document, its digest is theirs."""
    manifest = Manifest(
        kind="Adapter",
        run_key="0" * 16,
        writer="0a1b2c3d",
        root="0a1b2c3d/adapter",
        created_at="2026-01-01T00:00:00Z",
        files=[ManifestFile(path="a", bytes=3, sha256=SHA), ManifestFile(path="b", bytes=4, sha256=SHA)],
    )
    stored = manifest.to_bytes()
    assert Manifest.model_validate_json(stored) == manifest
    assert manifest.size_bytes == 7
    assert digest_of(stored) == "sha256:" + hashlib.sha256(stored).hexdigest()
