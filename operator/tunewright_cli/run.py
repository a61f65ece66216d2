"""`tunewright run`: a FineTuneJob or an AdapterMerge on this machine, by the same supervisor as in the cluster."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.live import Live

from tunewright_api.exit_codes import ExitCode
from tunewright_api.merge_run import MergeRun, build_merge_run
from tunewright_api.references import referred_jobs, referred_merge
from tunewright_api.run_config import HubSettings, StorageSettings, TrainRun, build_train_run, resolve_storage
from tunewright_api.run_report import Progress, RunReport
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge
from tunewright_api.v1alpha1.finetunejob import FineTuneJob, Resources
from tunewright_cli.documents import load_any
from tunewright_cli.errors import InvalidArgument
from tunewright_cli.storage import storage_settings, trainer_errors
from tunewright_cli.view import frame, result_lines, verification_lines

if TYPE_CHECKING:
    from tunewright_trainer.transfer import Stop

LOCAL_NAMESPACE = "local"


def run(
    file: str, wanted: str | None, work: Path | None, *, endpoint: str | None, region: str | None, as_json: bool
) -> int:
    """Train or merge, show the progress on a terminal and the log elsewhere, and return the run's exit code.

    Raises:
        InvalidFile: No valid FineTuneJob or AdapterMerge in the file.
        InvalidArgument: Several, and none is chosen; or it refers to a FineTuneJob by name, or wants nodes.
        MissingPackage: The trainer is not installed.
    """
    job = load_any(file, wanted, local=True)
    name = job.metadata.name
    _refuse_names(name, referred_jobs(job.spec), referred_merge(job.spec))
    storage = storage_settings(resolve_storage(job.spec, StorageSettings()), endpoint=endpoint, region=region)
    document: TrainRun | MergeRun
    if isinstance(job, AdapterMerge):
        document = build_merge_run(job.spec, name=name, namespace=LOCAL_NAMESPACE, attempt=1, storage=storage)
    else:
        _refuse_nodes(job)
        document = build_train_run(job.spec, name=name, namespace=LOCAL_NAMESPACE, attempt=1, storage=storage)
    # Here the token is that of HF_TOKEN or of `hf auth login`, so messages must not speak of a Secret.
    document = document.model_copy(update={"hub": HubSettings(endpoint=document.hub.endpoint)})
    folder = work or Path(tempfile.mkdtemp(prefix=f"tunewright-{name}-"))
    report = _carry_out(document, folder, as_json=as_json)
    if work is None:
        _clean(folder, keep_log=report.exit_code != ExitCode.SUCCESS)
    if as_json:
        typer.echo(report.model_dump_json(by_alias=True, exclude_none=True, indent=2))
    else:
        _print(report, folder)
    return report.exit_code


def _refuse_names(name: str, jobs: Sequence[str], merge: str | None) -> None:
    if merge is not None:
        raise InvalidArgument(
            f"{name} refers to AdapterMerge {merge!r} by name, which a local run cannot look up: give its model as "
            f"model.uri instead of model.fromMerge; `kubectl get am {merge} -o jsonpath='{{.status.output.uri}}'` "
            "prints it"
        )
    for other in jobs:
        raise InvalidArgument(
            f"{name} refers to FineTuneJob {other!r} by name, which a local run cannot look up: give its "
            "result as uri instead of fineTuneJob; "
            f"`kubectl get ftj {other} -o jsonpath='{{.status.output.manifestUri}}'` prints it"
        )


def _refuse_nodes(job: FineTuneJob) -> None:
    nodes = (job.spec.resources or Resources()).nodes
    if nodes > 1:
        raise InvalidArgument(
            f"{job.metadata.name} trains on {nodes} nodes, and a local run has only this machine: set resources.nodes "
            "to 1 (for the same global batch, multiply hyperparameters.gradientAccumulationSteps by "
            f"{nodes}), or apply it to a cluster"
        )


def _carry_out(document: TrainRun | MergeRun, folder: Path, *, as_json: bool) -> RunReport:
    console = Console(highlight=False)
    live = console.is_terminal and not as_json
    newest: list[Progress | None] = [None]

    def remember(progress: Progress) -> None:
        newest[0] = progress

    with trainer_errors():
        from tunewright_trainer import supervisor
        from tunewright_trainer.settings import SupervisorSettings

        settings = SupervisorSettings(
            work=folder,
            writer=secrets.token_hex(4),
            on_progress=remember,
            local=True,
            echo=not live and not as_json,
        )
        with _stopped_by_signals(settings.stop):
            if not live:
                return supervisor.run(document, settings)
            with Live(
                get_renderable=lambda: frame(_title(document), newest[0], ()), console=console, refresh_per_second=4
            ):
                return supervisor.run(document, settings)


def _title(document: TrainRun | MergeRun) -> str:
    if isinstance(document, TrainRun):
        return f"{document.name}: {document.method} of {document.model.uri}"
    count = len(document.adapters)
    return f"{document.name}: merge of {document.adapters[0].uri if count == 1 else f'{count} adapters'}"


@contextmanager
def _stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Let Ctrl-C end the run in order: worker gone, report made."""
    before = {
        number: signal.signal(number, lambda *_: stop.request("interrupted"))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clean(folder: Path, *, keep_log: bool) -> None:
    """Remove the temporary work folder; what a failed run said of itself stays."""
    if not keep_log:
        shutil.rmtree(folder)
        return
    for path in folder.iterdir():
        if path.name != "logs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _print(report: RunReport, folder: Path) -> None:
    if report.exit_code != ExitCode.SUCCESS:
        typer.echo(f"failed           {report.reason}: {report.message}", err=True)
        typer.echo(f"log              {folder / 'logs'}", err=True)
        return
    typer.echo(f"complete         {report.reason}")
    for line in (*result_lines(report.output, report.evaluation), *verification_lines(report.verification)):
        typer.echo(line)
