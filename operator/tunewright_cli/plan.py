"""`tunewright plan`: every default filled in, the number of steps, what the operator would create."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.finetunejob import FineTuneJob
from tunewright_api.validation import InvalidDocument, parse_finetunejob
from tunewright_cli.documents import load_one
from tunewright_cli.errors import InvalidFile, MissingPackage
from tunewright_cli.rows import Rows, check_rows, rows_per_step, steps_of
from tunewright_cli.storage import storage_settings

# Parts of the run document that carry defaults, with the place of the same part in the spec.
_PARTS = {
    "hyperparameters": ("hyperparameters",),
    "lora": ("method", "lora"),
    "quantization": ("method", "quantization"),
    "evaluation": ("evaluation",),
    "model": ("model",),
    "storage": ("storage",),
    "hub": ("hub",),
}
_UNKNOWN_UNTIL_CREATED = "set-by-the-api-server"
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One resolved field. `given` tells whether the spec has it; otherwise it is a default."""

    path: str
    value: Any
    given: bool


def run(file: str, wanted: str | None, output: str, *, endpoint: str | None, region: str | None) -> None:
    """Print the plan of one FineTuneJob.

    Raises:
        InvalidFile: No valid FineTuneJob in the file, or one that is too large.
        TrainerFailure: The data could be read, and rows of it are bad.
        MissingPackage: The operator's settings cannot be read, because its extra is not installed.
    """
    job = load_one(file, wanted, local=True)
    metadata = job.metadata.model_copy(
        update={"namespace": job.metadata.namespace or "default", "uid": _UNKNOWN_UNTIL_CREATED}
    )
    job = job.model_copy(update={"metadata": metadata})
    train_run, manifests = _render(job)
    rows = check_rows(train_run, storage_settings(train_run.storage, endpoint=endpoint, region=region))
    settings = list(settings_of(job, train_run))
    if output == "text":
        _print(job, train_run, settings, rows, manifests)
        return
    document = {
        "name": job.metadata.name,
        "settings": [{"field": s.path, "value": s.value, "from": _origin(s)} for s in settings],
        "data": {
            "trainRows": rows.train,
            "validationRows": rows.validation,
            "format": rows.format,
            "problem": rows.problem,
        },
        "scale": {
            "nodes": train_run.nodes,
            "processesPerNode": train_run.processes,
            "parallelism": train_run.parallelism,
            "globalBatchSize": train_run.global_batch_size,
        },
        "totalSteps": steps_of(train_run, rows.train),
        "job": manifests.get("Job"),
        "service": manifests.get("Service"),
    }
    text = json.dumps(document, indent=2) if output == "json" else yaml.safe_dump(document, sort_keys=False, width=110)
    typer.echo(text.rstrip("\n"))


def _render(job: FineTuneJob) -> tuple[TrainRun, dict[str, Manifest]]:
    """Return the run document of the first attempt, and what is created for it by kind, in the order of creation."""
    try:
        from tunewright_operator.errors import RunTooLarge
        from tunewright_operator.plan import build_job, build_service, plan_run
        from tunewright_operator.settings import Settings
    except ModuleNotFoundError as error:
        raise MissingPackage(f"plan needs {error.name}: pip install 'tunewright[cli,operator]'") from None
    settings = Settings()
    train_run = plan_run(job, 1, 0, settings)
    manifests: dict[str, Manifest] = {}
    if _has_local_paths(job):
        return train_run, manifests
    if train_run.nodes > 1:
        manifests["Service"] = build_service(job, 1)
    try:
        manifests["Job"] = build_job(job, 1, 0, settings)
    except RunTooLarge as error:
        raise InvalidFile(f"{job.metadata.name}: {error}") from None
    return train_run, manifests


def _has_local_paths(job: FineTuneJob) -> bool:
    try:
        parse_finetunejob(job.document())
    except InvalidDocument:
        return True
    return False


def settings_of(job: FineTuneJob, train_run: TrainRun) -> Iterator[Setting]:
    """Yield every resolved setting of a run with its place in the spec, where it has one."""
    resolved = train_run.document()
    written = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for part, place in _PARTS.items():
        given = _at(written, place)
        for name, value in (resolved.get(part) or {}).items():
            yield Setting(".".join((*place, name)), value, given.get(name) is not None)


def _at(document: Mapping[str, Any], place: tuple[str, ...]) -> Mapping[str, Any]:
    part: Mapping[str, Any] = document
    for name in place:
        part = part.get(name) or {}
    return part


def _origin(setting: Setting) -> str:
    return "given" if setting.given else "default"


def _print(
    job: FineTuneJob,
    train_run: TrainRun,
    settings: list[Setting],
    rows: Rows,
    manifests: Mapping[str, Manifest],
) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{job.metadata.name}[/]: {job.spec.method.type} of {job.spec.model.uri}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("FIELD", no_wrap=True, min_width=max(len(setting.path) for setting in settings))
    table.add_column("VALUE", overflow="fold")
    table.add_column("FROM")
    for setting in settings:
        table.add_row(setting.path, _shown(setting.value), _origin(setting), style=None if setting.given else "dim")
    console.print(table)
    console.print(f"\nData:  {_data(rows)}", markup=False)
    steps = steps_of(train_run, rows.train)
    each = rows_per_step(train_run)
    console.print(f"Scale: {_scale(train_run)}")
    console.print(f"Steps: {'unknown until the rows are counted' if steps is None else steps}, {each} rows each")
    if not manifests:
        console.print("\nNo Job: local paths are only for `tunewright run`.")
        return
    console.print(f"\n{' and '.join(manifests)} that the operator creates for the first attempt:\n")
    typer.echo(yaml.safe_dump_all(manifests.values(), sort_keys=False, width=110), nl=False)


def _scale(run: TrainRun) -> str:
    nodes = f"{run.nodes} nodes with" if run.nodes > 1 else "1 node with"
    processes = f"{run.processes} processes" if run.processes > 1 else "1 process"
    each = " each" if run.nodes > 1 else ""
    parallelism = f", {run.parallelism}" if run.world_size > 1 else ""
    return f"{nodes} {processes}{each}{parallelism}, global batch {run.global_batch_size}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _data(rows: Rows) -> str:
    if rows.problem is not None:
        return f"not looked at: {rows.problem}"
    validation = f", {rows.validation} for validation" if rows.validation is not None else ""
    return f"{rows.train} {rows.format} rows for training{validation}"
