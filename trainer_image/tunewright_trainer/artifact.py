"""Downloads a published result and checks every byte of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunewright_api.manifest import LATEST_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Latest, Manifest, ManifestFile
from tunewright_trainer.errors import CorruptArtifact, MissingFile
from tunewright_trainer.publish import load_manifest
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import Advance, StoredFile, ignore

RUN_DOCUMENT = "run.json"
MAX_DOCUMENT_BYTES = 1024 * 1024


def download_artifact(uri: str, target: Path, storage: Storage, advance: Advance = ignore) -> Manifest:
    """Fetch the folder that from_pretrained loads into `target`.

    Args:
        uri: An output folder (its newest result), a folder of a run key, a manifest, or the folder of an adapter or
            model itself.
        target: A folder that does not exist yet or is empty; nothing is left there when a file does not verify.
        storage: Where from.
        advance: Told the bytes fetched.

    Returns:
        The manifest that the files were checked against.

    Raises:
        MissingFile: There is no published result at the URI.
        CorruptArtifact: A file is missing or differs from the manifest in size or SHA-256.
        FileExistsError: `target` is not empty.
    """
    manifest, folder = find_manifest(uri, storage)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: choose another folder")
    prefix = f"{manifest.root}/"
    files = [file for file in manifest.files if file.path.startswith(prefix)]
    if not files:
        raise CorruptArtifact(f"{join(folder, MANIFEST_NAME)} names no files below {manifest.root}")
    target.mkdir(parents=True, exist_ok=True)
    try:
        storage.download([_item(storage, folder, prefix, file, target) for file in files], advance)
        for file in files:
            _verify(folder, file, target / file.path.removeprefix(prefix))
    # An interrupt too: files that were not verified must not stay.
    except BaseException:
        shutil.rmtree(target)
        raise
    return manifest


def find_manifest(uri: str, storage: Storage) -> tuple[Manifest, str]:
    """Return the manifest that a URI leads to, and its folder; raises as `download_artifact` does."""
    uri = uri.rstrip("/")
    own = uri.removesuffix(f"/{MANIFEST_NAME}")
    for folder in (own, *(_latest(uri, storage) if own == uri else [])):
        loaded = load_manifest(storage, join(folder, MANIFEST_NAME))
        if loaded is not None:
            return loaded[0], folder
    # The URI of an adapter is <run key>/<writer>/adapter.
    folder = uri.rpartition("/")[0].rpartition("/")[0]
    if "://" not in uri or folder.count("/") >= 3:
        loaded = load_manifest(storage, join(folder, MANIFEST_NAME))
        if loaded is not None and uri == join(folder, loaded[0].root):
            return loaded[0], folder
    raise MissingFile(
        f"{uri}: no published result: neither {LATEST_NAME} nor {MANIFEST_NAME} is there "
        "(the manifest is written last, so a run that did not end has none)"
    )


def read_document(storage: Storage, folder: str, manifest: Manifest, name: str) -> dict[str, Any]:
    """Read a small JSON file of a published run, checked against its manifest.

    Raises:
        CorruptArtifact: It is missing, differs from the manifest, or is no JSON object.
    """
    uri = join(folder, name)
    expected = next((file.sha256 for file in manifest.files if file.path == name), None)
    stored = storage.read(uri, MAX_DOCUMENT_BYTES)
    if expected is None or stored is None:
        raise CorruptArtifact(f"{uri}: missing" + ("" if expected is None else ", but the manifest names it"))
    digest = hashlib.sha256(stored[0]).hexdigest()
    if digest != expected:
        raise CorruptArtifact(f"{uri}: SHA-256 is {digest}, the manifest says {expected}")
    try:
        document = json.loads(stored[0])
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise CorruptArtifact(f"{uri}: must be a JSON object")
    return document


def _latest(uri: str, storage: Storage) -> list[str]:
    stored = storage.read(join(uri, LATEST_NAME), MAX_MANIFEST_BYTES)
    if stored is None:
        return []
    try:
        latest = Latest.model_validate_json(stored[0])
    except ValidationError as error:
        raise CorruptArtifact(f"{join(uri, LATEST_NAME)}: {error.errors()[0]['msg']}") from None
    if latest.manifest != f"{latest.run_key}/{MANIFEST_NAME}":
        raise CorruptArtifact(f"{join(uri, LATEST_NAME)}: {latest.manifest!r} is not a manifest of this folder")
    return [join(uri, latest.run_key)]


def _item(storage: Storage, folder: str, prefix: str, file: ManifestFile, target: Path) -> tuple[str, StoredFile, Path]:
    uri = join(folder, file.path)
    try:
        stored = storage.stat(uri)
    except MissingFile:
        raise CorruptArtifact(f"{uri}: missing, but the manifest names it") from None
    if stored.size_bytes != file.bytes:
        raise CorruptArtifact(f"{uri}: has {stored.size_bytes} bytes, the manifest says {file.bytes}")
    return uri, stored, target / file.path.removeprefix(prefix)


def _verify(folder: str, file: ManifestFile, path: Path) -> None:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.sha256:
        raise CorruptArtifact(f"{join(folder, file.path)}: SHA-256 is {digest}, the manifest says {file.sha256}")
