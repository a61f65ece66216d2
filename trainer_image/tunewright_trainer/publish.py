"""Publishes a run: files first, the manifest last of all. A folder without a manifest is no result.

<output>/<runKey>/<writer>/...       files of one attempt; two writers never share a folder
<output>/<runKey>/manifest.json      conditional put: the first writer wins
<output>/latest.json                 points to the newest published run
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tunewright_api.manifest import (
    LATEST_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Latest,
    Manifest,
    ManifestFile,
    digest_of,
)
from tunewright_api.run_report import PublishedOutput
from tunewright_trainer.errors import CorruptArtifact, StorageUnavailable
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.tensorboard import FILE_PREFIX as EVENT_FILE_PREFIX
from tunewright_trainer.tracker import now
from tunewright_trainer.transfer import Advance, ignore
from tunewright_trainer.wandb import FILE_SUFFIX as OFFLINE_RUN_SUFFIX

PARALLEL_UPLOADS = 4
MERGED_FOLDER = "merged"
GGUF_FOLDER = "gguf"
GGUF_SUFFIX = ".gguf"
PUBLISHED_SUFFIXES = (".safetensors", ".json", ".jsonl", ".md", ".txt", ".jinja", ".log", OFFLINE_RUN_SUFFIX)
PUBLISHED_NAMES = ("tokenizer.model", "spiece.model")
"""Text, tensors and SentencePiece tables. Never a pickle: whoever loads one runs what its writer wanted."""


@dataclass(frozen=True)
class Published:
    """A valid result in storage."""

    manifest: Manifest
    output: PublishedOutput


def is_publishable(name: str) -> bool:
    """Tell whether a file of the worker's output belongs into the result."""
    base = name.rpartition("/")[2]
    return base.endswith(PUBLISHED_SUFFIXES) or base in PUBLISHED_NAMES or base.startswith(EVENT_FILE_PREFIX)


def output_files(folder: Path) -> dict[str, Path]:
    """Return the publishable files below a folder by relative name; links are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path for name, path in named.items() if is_publishable(name)}


def load_manifest(storage: Storage, manifest_uri: str) -> tuple[Manifest, bytes, str] | None:
    """Read a manifest: the document, its bytes and its version; None where there is none.

    Raises:
        CorruptArtifact: What stands there is no manifest.
    """
    stored = storage.read(manifest_uri, MAX_MANIFEST_BYTES)
    if stored is None:
        return None
    data, version = stored
    try:
        return Manifest.model_validate_json(data), data, version
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptArtifact(f"{manifest_uri}: not a manifest: {first['msg']} at {first['loc']}") from None


def find_published(storage: Storage, output_uri: str, run_key: str) -> Published | None:
    """Return the published result of a run key, None where there is none.

    Sizes are compared, contents are not: whoever downloads the result checks the hashes.

    Raises:
        CorruptArtifact: There is a manifest, but it or its files are damaged.
    """
    folder = join(output_uri, run_key)
    manifest_uri = join(folder, MANIFEST_NAME)
    loaded = load_manifest(storage, manifest_uri)
    if loaded is None:
        return None
    manifest, data, _ = loaded
    _verify_sizes(storage, folder, manifest)
    return Published(manifest, _output(folder, manifest, data))


def _verify_sizes(storage: Storage, folder: str, manifest: Manifest) -> None:
    sizes = {file.name: file.size_bytes for file in storage.listing(folder)}
    for file in manifest.files:
        if sizes.get(file.path) != file.bytes:
            there = f"has {sizes[file.path]} bytes" if file.path in sizes else "is missing"
            raise CorruptArtifact(f"{join(folder, file.path)} {there}, the manifest says {file.bytes} bytes")


def _output(folder: str, manifest: Manifest, data: bytes) -> PublishedOutput:
    merged = f"{manifest.writer}/{MERGED_FOLDER}"
    has_merged = manifest.root != merged and any(file.path.startswith(f"{merged}/") for file in manifest.files)
    gguf = [join(folder, file.path) for file in manifest.files if file.path.endswith(GGUF_SUFFIX)]
    return PublishedOutput(
        uri=join(folder, manifest.root),
        manifest_uri=join(folder, MANIFEST_NAME),
        digest=digest_of(data),
        size_bytes=manifest.size_bytes,
        merged_uri=join(folder, merged) if has_merged else None,
        gguf_uris=gguf or None,
    )


@dataclass(frozen=True)
class Result:
    """What is to be published."""

    run_key: str
    writer: str
    kind: Literal["Adapter", "Model"]
    root: str
    """Folder of the files, relative to the writer's, that from_pretrained loads."""
    files: Mapping[str, Path]
    """Local files by their name in the writer's folder."""
    metrics: Mapping[str, Any]
    stored: Sequence[ManifestFile] = ()
    """Files that are in the writer's folder already; their paths are relative to it."""
    verification: Mapping[str, Any] | None = None
    """What was proved of a merged model."""


def publish(
    storage: Storage, output_uri: str, result: Result, advance: Advance = ignore, say: Callable[[str], None] = print
) -> tuple[Published, bool]:
    """Upload the local files of a result and make it valid; see `store` and `make_valid`."""
    return make_valid(storage, output_uri, store(storage, output_uri, result, advance), say)


def store(storage: Storage, output_uri: str, result: Result, advance: Advance = ignore) -> Manifest:
    """Upload the local files of a result.

    Args:
        storage: Where to.
        output_uri: The user's output folder.
        result: What.
        advance: Told the bytes uploaded.

    Returns:
        The manifest that would make it valid.

    Raises:
        StorageUnavailable: Storage does not hold what was uploaded.
    """
    folder = join(output_uri, result.run_key)
    uploaded = _upload(storage, join(folder, result.writer), result, advance)
    files = [
        file.model_copy(update={"path": f"{result.writer}/{file.path}"})
        for file in sorted((*result.stored, *uploaded), key=lambda file: file.path)
    ]
    manifest = Manifest(
        kind=result.kind,
        run_key=result.run_key,
        writer=result.writer,
        root=f"{result.writer}/{result.root}",
        created_at=now(),
        files=files,
        metrics=dict(result.metrics),
        verification=dict(result.verification) if result.verification is not None else None,
    )
    try:
        _verify_sizes(storage, folder, manifest)
    except CorruptArtifact as error:
        raise StorageUnavailable(f"the upload is not complete: {error}") from None
    return manifest


def make_valid(
    storage: Storage, output_uri: str, manifest: Manifest, say: Callable[[str], None] = print
) -> tuple[Published, bool]:
    """Put the manifest of a stored result in its place.

    After an error nobody knows whether it is there: the files must stay.

    Args:
        storage: Where to.
        output_uri: The user's output folder.
        manifest: Of the stored files.
        say: Told what a reader of the log should know.

    Returns:
        The published result, and whether it is another writer's that was there first.
    """
    folder = join(output_uri, manifest.run_key)
    first = _put_manifest(storage, output_uri, manifest, say)
    if first is not None:
        storage.delete_folder(join(folder, manifest.writer))
        return first, True
    point_to(storage, output_uri, manifest.run_key, replaces="*")
    return Published(manifest, _output(folder, manifest, manifest.to_bytes())), False


def point_to(storage: Storage, output_uri: str, run_key: str, *, replaces: str | None) -> None:
    """Let latest.json name a published run; with `replaces` None only where there is no such file."""
    latest = Latest(run_key=run_key, manifest=f"{run_key}/{MANIFEST_NAME}", updated_at=now())
    data = latest.model_dump_json(by_alias=True, indent=2).encode()
    storage.put(join(output_uri, LATEST_NAME), data, replaces=replaces)


def _upload(storage: Storage, folder: str, result: Result, advance: Advance) -> list[ManifestFile]:
    def upload(name: str, path: Path) -> ManifestFile:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        storage.upload(path, join(folder, name), advance)
        return ManifestFile(path=name, bytes=path.stat().st_size, sha256=digest)

    with ThreadPoolExecutor(PARALLEL_UPLOADS, "upload") as pool:
        return list(pool.map(upload, *zip(*sorted(result.files.items()), strict=True)))


def _put_manifest(
    storage: Storage, output_uri: str, manifest: Manifest, say: Callable[[str], None]
) -> Published | None:
    """Make the result valid; return the other writer's valid result if one was first."""
    uri = join(join(output_uri, manifest.run_key), MANIFEST_NAME)
    data = manifest.to_bytes()
    version: str | None = None
    while not storage.put(uri, data, replaces=version):
        stored = storage.read(uri, MAX_MANIFEST_BYTES)
        if stored is None:
            version = None
            continue
        if stored[0] == data:  # our own put, whose answer got lost on the way
            return None
        try:
            first = find_published(storage, output_uri, manifest.run_key)
        except CorruptArtifact as error:
            say(f"replacing a damaged result: {error}")
            version = stored[1]
            continue
        if first is not None:
            return first
    return None
