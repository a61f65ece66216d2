"""`tunewright verify`: a published result against its manifest, and a merged model against what it was made of."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tunewright_api.exit_codes import ExitCode
from tunewright_api.manifest import MANIFEST_NAME
from tunewright_cli.storage import storage_settings, trainer_errors

if TYPE_CHECKING:
    from tunewright_trainer.merge.audit import Check, PublishedResult, Tools

DIFFERS = int(ExitCode.INTERNAL_ERROR)


def run(uri: str, *, files_only: bool, logits: bool, endpoint: str | None, region: str | None, as_json: bool) -> int:
    """Check a result, print what was found, and return the exit code: 0, or 1 when something differs.

    Raises:
        TrainerFailure: There is no result, or it, its base or its adapters cannot be read.
        MissingPackage: The trainer is not installed.
    """
    settings = storage_settings(endpoint=endpoint, region=region)
    with trainer_errors(), tempfile.TemporaryDirectory(prefix="tunewright-verify-") as work:
        from tunewright_trainer.merge.audit import Tools, open_result
        from tunewright_trainer.run_log import Redactor, RunLog
        from tunewright_trainer.storage import Storage, join
        from tunewright_trainer.transfer import Stop

        storage = Storage(settings, local=True)
        result = open_result(uri, storage)
        with RunLog(Path(work) / "log", Redactor(os.environ), echo=False) as log:
            tools = Tools(storage, Path(work), log, Stop())
            checks = list(_checks(result, tools, files_only=files_only, logits=logits, quiet=as_json))
        _print(join(result.folder, MANIFEST_NAME), checks, as_json=as_json)
    return ExitCode.SUCCESS if all(check.passed for check in checks) else DIFFERS


def _print(manifest_uri: str, checks: list[Check], *, as_json: bool) -> None:
    if as_json:
        found = [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in checks]
        passed = all(check.passed for check in checks)
        typer.echo(json.dumps({"manifestUri": manifest_uri, "passed": passed, "checks": found}, indent=2))
        return
    typer.echo(f"manifest  {manifest_uri}")
    for check in checks:
        typer.echo(f"{check.name:<9} {'passed' if check.passed else 'FAILED'}  {check.detail}")


def _checks(result: PublishedResult, tools: Tools, *, files_only: bool, logits: bool, quiet: bool) -> Iterator[Check]:
    from tunewright_trainer.merge import audit

    manifest = result.manifest
    with _progress("Files", manifest.size_bytes, quiet=quiet) as advance:
        files = audit.check_files(result, tools.storage, advance)
    yield files
    # Damaged files need no further look.
    if files_only or not files.passed:
        return
    if manifest.kind == "Adapter":
        yield audit.check_adapter(result, tools)
    if result.merged is None:
        return
    reference = audit.find_reference(result, tools)
    size = sum(file.bytes for file in manifest.files if file.path.startswith(f"{result.merged}/"))
    with _progress("Weights", size, quiet=quiet) as advance:
        weights = audit.check_weights(result, reference, tools, advance)
    yield weights
    if logits and weights.passed:
        yield audit.check_logits(result, reference, tools)


@contextmanager
def _progress(name: str, total_bytes: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task(name, total=total_bytes)
        yield lambda size: progress.advance(task, size)
