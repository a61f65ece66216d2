"""The rows of a run, where they can be read from here, and how many steps they make."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunewright_api.run_config import StorageSettings, TrainRun
from tunewright_api.v1alpha1.parts import Dataset
from tunewright_cli.errors import CliError
from tunewright_cli.storage import trainer_errors

MAX_FETCHED_BYTES = 1024**3
"""Most data that is fetched only to look at it."""


@dataclass(frozen=True)
class Rows:
    """Rows of a run; `problem` says why they were not looked at."""

    train: int | None = None
    validation: int | None = None
    format: str | None = None
    problem: str | None = None


class _OutOfReach(Exception):
    """The rows cannot be read from here; the message says why."""


def check_rows(run: TrainRun, settings: StorageSettings) -> Rows:
    """Read and check all rows as the trainer does, with the credentials of the environment.

    Raises:
        TrainerFailure: Rows are bad; the message names them by file, line and field.
    """
    with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
        try:
            with trainer_errors():
                paths = _fetch(run.dataset, settings, Path(folder))
        except (_OutOfReach, CliError) as error:
            return Rows(problem=str(error))
        with trainer_errors():
            from tunewright_trainer.dataset import prepare
            from tunewright_trainer.transfer import Stop, ignore

            data = prepare(
                run.dataset,
                paths,
                Path(folder) / "checked",
                run.hyperparameters.seed,
                Stop(),
                ignore,
                run.objective.type,
                run.objective.reward_columns,
                run.objective.labels,
            )
    return Rows(data.train_rows, data.validation_rows or None, data.format.name)


def _fetch(dataset: Dataset, settings: StorageSettings, folder: Path) -> dict[str, dict[str, Path]]:
    """Return where the file of each source lies on this machine, by the source's address and the file's URI."""
    from tunewright_trainer.storage import Storage

    storage = Storage(settings, local=True)
    uris = dict.fromkeys(source.uri for source in [*dataset.train, *(dataset.validation or [])])
    for uri in uris:
        if uri.startswith("pvc://"):
            raise _OutOfReach(f"{uri} can be read only in the cluster")
        if uri.startswith("hf://"):
            raise _OutOfReach(f"{uri} lies on the Hub: the run itself fetches and checks it")
    files = {uri: storage.stat(uri) for uri in uris}
    size_bytes = sum(file.size_bytes for uri, file in files.items() if uri.startswith("s3://"))
    if size_bytes > MAX_FETCHED_BYTES:
        raise _OutOfReach(f"the files have {size_bytes / 1e9:.1f} GB, more than is fetched for a look")
    paths = {uri: storage.local_path(uri) or folder / str(index) for index, uri in enumerate(uris)}
    storage.download([(uri, files[uri], paths[uri]) for uri in uris if uri.startswith("s3://")])
    return {uri: {uri: path} for uri, path in paths.items()}


def rows_per_step(run: TrainRun) -> int:
    """Return how many rows an optimizer step takes: prompts, where several answers to each are compared."""
    grpo = run.objective.grpo
    return run.global_batch_size // (grpo.generations if grpo is not None else 1)


def steps_of(run: TrainRun, train_rows: int | None) -> int | None:
    """Return the number of optimizer steps, or None where it depends on rows that nobody counted.

    The last micro-batches and the last accumulation of an epoch may be smaller; they still make a step. Where several
    answers to each prompt are compared, only whole steps count.
    """
    given = run.hyperparameters
    if given.max_steps is not None:
        return given.max_steps
    if train_rows is None or given.epochs is None or given.packing:
        return None
    if run.objective.grpo is not None:
        return math.ceil(given.epochs * (train_rows // rows_per_step(run)))
    return math.ceil(given.epochs * max(1, math.ceil(train_rows / rows_per_step(run))))
