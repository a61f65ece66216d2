"""`tunewright plan`: every default filled in, the number of steps, what the operator would create."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from tunewright_api.references import referred_merge, with_merged_model
from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge
from tunewright_api.v1alpha1.finetunejob import FineTuneJob
from tunewright_api.validation import InvalidDocument, parse_finetunejob
from tunewright_cli import plan_merge
from tunewright_cli.documents import load_any
from tunewright_cli.errors import InvalidFile, MissingPackage
from tunewright_cli.rows import Rows, check_rows, rows_per_step, steps_of
from tunewright_cli.settings_table import (
    Manifest,
    Setting,
    print_document,
    print_manifests,
    print_settings,
    settings_of,
)
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
_UNKNOWN_UNTIL_MERGED = "s3://set-once-the-merge-is-complete/"


def run(file: str, wanted: str | None, output: str, *, endpoint: str | None, region: str | None) -> None:
    """Print the plan of one FineTuneJob or AdapterMerge.

    Raises:
        InvalidFile: No valid one in the file, or one that is too large.
        TrainerFailure: The data could be read, and rows of it are bad.
        MissingPackage: The operator's settings cannot be read, because its extra is not installed.
    """
    job = load_any(file, wanted, local=True)
    metadata = job.metadata.model_copy(
        update={"namespace": job.metadata.namespace or "default", "uid": _UNKNOWN_UNTIL_CREATED}
    )
    if isinstance(job, AdapterMerge):
        plan_merge.run(job.model_copy(update={"metadata": metadata}), output)
        return
    _plan_training(job.model_copy(update={"metadata": metadata}), output, endpoint=endpoint, region=region)


def _plan_training(job: FineTuneJob, output: str, *, endpoint: str | None, region: str | None) -> None:
    train_run, manifests = _render(job)
    rows = check_rows(train_run, storage_settings(train_run.storage, endpoint=endpoint, region=region))
    settings = _settings(job, train_run)
    if output == "text":
        _print(job, train_run, settings, rows, manifests)
        return
    document = {
        "name": job.metadata.name,
        "settings": [setting.document() for setting in settings],
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
    print_document(document, output)


def _render(job: FineTuneJob) -> tuple[TrainRun, dict[str, Manifest]]:
    """Return the run document of the first attempt, and what is created for it by kind, in the order of creation."""
    try:
        from tunewright_operator.errors import RunTooLarge
        from tunewright_operator.plan import build_job, build_service, plan_run
        from tunewright_operator.settings import Settings
    except ModuleNotFoundError as error:
        raise MissingPackage(f"plan needs {error.name}: pip install 'tunewright[cli,operator]'") from None
    settings = Settings()
    is_local, merge = _has_local_paths(job), referred_merge(job.spec)
    if merge is not None:
        job = job.model_copy(update={"spec": with_merged_model(job.spec, f"{_UNKNOWN_UNTIL_MERGED}{merge}")})
    train_run = plan_run(job, 1, 0, settings)
    manifests: dict[str, Manifest] = {}
    if is_local:
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


def _settings(job: FineTuneJob, train_run: TrainRun) -> list[Setting]:
    written = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    found = settings_of(train_run.document(), written, _PARTS)
    merge = referred_merge(job.spec)
    if merge is None:
        return list(found)
    return [Setting("model.fromMerge", merge, True) if one.path == "model.uri" else one for one in found]


def _print(
    job: FineTuneJob,
    train_run: TrainRun,
    settings: list[Setting],
    rows: Rows,
    manifests: Mapping[str, Manifest],
) -> None:
    console = Console(highlight=False)
    merge = referred_merge(job.spec)
    model = job.spec.model.uri if merge is None else f"the model of AdapterMerge {merge}"
    console.print(f"[bold]{job.metadata.name}[/]: {job.spec.method.type} of {model}\n")
    print_settings(console, settings)
    console.print(f"\nData:  {_data(rows)}", markup=False)
    steps = steps_of(train_run, rows.train)
    each = rows_per_step(train_run)
    console.print(f"Scale: {_scale(train_run)}")
    console.print(f"Steps: {'unknown until the rows are counted' if steps is None else steps}, {each} rows each")
    print_manifests(console, manifests)


def _scale(run: TrainRun) -> str:
    nodes = f"{run.nodes} nodes with" if run.nodes > 1 else "1 node with"
    processes = f"{run.processes} processes" if run.processes > 1 else "1 process"
    each = " each" if run.nodes > 1 else ""
    parallelism = f", {run.parallelism}" if run.world_size > 1 else ""
    return f"{nodes} {processes}{each}{parallelism}, global batch {run.global_batch_size}"


def _data(rows: Rows) -> str:
    if rows.problem is not None:
        return f"not looked at: {rows.problem}"
    validation = f", {rows.validation} for validation" if rows.validation is not None else ""
    return f"{rows.train} {rows.format} rows for training{validation}"
