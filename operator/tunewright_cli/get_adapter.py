"""`tunewright get-adapter`: download a published result and verify every byte of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tunewright_api.manifest import MANIFEST_NAME, Manifest, digest_of
from tunewright_api.run_config import StorageSettings, resolve_storage
from tunewright_api.v1alpha1.status import RunStatus
from tunewright_api.validation import parse_adaptermerge, parse_finetunejob
from tunewright_cli.errors import InvalidArgument, NotFound, TrainerFailure
from tunewright_cli.storage import storage_settings, trainer_errors

if TYPE_CHECKING:
    from tunewright_trainer.storage import Storage


@dataclass(frozen=True)
class Source:
    """Where a result lies. `digest` is what its status says of the manifest, where one was asked."""

    uri: str
    storage: StorageSettings | None = None
    digest: str | None = None


def run(
    source: str,
    target: Path,
    *,
    namespace: str | None,
    context: str | None,
    endpoint: str | None,
    region: str | None,
    as_json: bool,
) -> None:
    """Download into `target` and say what was verified.

    Raises:
        InvalidArgument: `target` is not empty.
        NotFound: The FineTuneJob or AdapterMerge does not exist or has no result.
        TrainerFailure: Storage refuses, there is no result, or a file differs from the manifest.
        AccessDenied, Unavailable: The cluster cannot be read.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidArgument(f"{target} is not an empty folder: choose another one")
    found = Source(source) if is_uri(source) else _of_job(source, namespace, context)
    settings = storage_settings(found.storage, endpoint=endpoint, region=region)
    with trainer_errors():
        from tunewright_trainer.artifact import find_manifest
        from tunewright_trainer.storage import Storage, join

        storage = Storage(settings, local=True)
        manifest, folder = find_manifest(found.uri, storage)
        manifest_uri = join(folder, MANIFEST_NAME)
        digest = _digest(storage, manifest_uri, found.digest)
        _download(manifest_uri, manifest, target, storage, quiet=as_json)
    _print(manifest, manifest_uri, digest, target, as_json=as_json)


def is_uri(source: str) -> bool:
    """Tell a URI or a path from the name of a FineTuneJob or AdapterMerge."""
    return "://" in source or source.startswith(("/", "./", "../"))


def _of_job(name: str, namespace: str | None, context: str | None) -> Source:
    from tunewright_cli.cluster import Workloads, target_of

    target = target_of(name)
    document = Workloads(namespace, context).get(target)
    status = RunStatus.model_validate(document.get("status") or {})
    if status.output is None:
        raise NotFound(f"{target} has no result: it is {status.phase or 'Pending'}")
    parse = parse_adaptermerge if target.is_merge else parse_finetunejob
    storage = resolve_storage(parse(document).spec, StorageSettings())
    return Source(status.output.manifest_uri, storage, status.output.digest)


def _digest(storage: Storage, manifest_uri: str, expected: str | None) -> str:
    from tunewright_trainer.errors import CorruptArtifact, MissingFile
    from tunewright_trainer.publish import load_manifest

    loaded = load_manifest(storage, manifest_uri)
    if loaded is None:
        raise MissingFile(f"{manifest_uri}: deleted meanwhile")
    digest = digest_of(loaded[1])
    if expected is not None and digest != expected:
        raise CorruptArtifact(f"{manifest_uri} has the digest {digest}, the status says {expected}")
    return digest


def _files_below_root(manifest: Manifest) -> list[str]:
    return [file.path for file in manifest.files if file.path.startswith(f"{manifest.root}/")]


def _download(manifest_uri: str, manifest: Manifest, target: Path, storage: Storage, *, quiet: bool) -> None:
    from tunewright_trainer.artifact import download_artifact

    wanted = set(_files_below_root(manifest))
    total = sum(file.bytes for file in manifest.files if file.path in wanted)
    with fetching(total, target, quiet=quiet) as advance:
        fetched = download_artifact(manifest_uri, target, storage, advance)
    if fetched != manifest:
        raise TrainerFailure(f"{manifest_uri} was replaced during the download: fetch it again", 1)


@contextmanager
def fetching(total_bytes: int, target: Path, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show the progress of a download; what is given is told the bytes.

    Raises:
        TrainerFailure: The files cannot be written.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("Fetching", total=total_bytes)
        try:
            yield lambda size: progress.advance(task, size)
        except OSError as error:
            raise TrainerFailure(f"{error.filename or target}: {error.strerror}", 1) from None


def _print(manifest: Manifest, manifest_uri: str, digest: str, target: Path, *, as_json: bool) -> None:
    files = _files_below_root(manifest)
    size_bytes = sum(file.bytes for file in manifest.files if file.path in set(files))
    if as_json:
        report = {
            "target": str(target),
            "kind": manifest.kind,
            "runKey": manifest.run_key,
            "manifestUri": manifest_uri,
            "digest": digest,
            "files": [path.removeprefix(f"{manifest.root}/") for path in files],
            "sizeBytes": size_bytes,
            "metrics": manifest.metrics,
        }
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"fetched   {manifest.kind.lower()} of run {manifest.run_key} into {target}")
    typer.echo(f"verified  size and SHA-256 of {len(files)} files, {size_bytes / 1e6:,.1f} MB")
    typer.echo(f"manifest  {manifest_uri} ({digest})")
