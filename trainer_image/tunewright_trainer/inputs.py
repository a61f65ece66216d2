"""The run's inputs: found and named first (that gives the run key), fetched and checked later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.run_config import TrainRun, run_key
from tunewright_api.v1alpha1.parts import DataSource
from tunewright_trainer import dataset, model_files
from tunewright_trainer.dataset import PreparedData
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import Advance, Stop, StoredFile, ignore

if TYPE_CHECKING:
    from tunewright_trainer.hub import HubModel


@dataclass(frozen=True)
class ModelInput:
    """The base model as storage describes it."""

    uri: str
    version: str
    """Commit of a hub model, else a digest over the versions of its files."""
    files: tuple[StoredFile, ...]
    hub: HubModel | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the files that are needed."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Inputs:
    """Everything that goes into a run."""

    model: ModelInput
    data: Mapping[str, StoredFile]

    @property
    def data_versions(self) -> dict[str, str]:
        """Version and size of every data file, by URI."""
        return {uri: f"{file.version}:{file.size_bytes}" for uri, file in self.data.items()}

    def key(self, run: TrainRun) -> str:
        """Return the run key."""
        return run_key(run, model_version=self.model.version, data_versions=self.data_versions)


def find_model(run: TrainRun, storage: Storage, stop: Stop) -> ModelInput:
    """Find the base model and choose the files to fetch.

    Raises:
        MissingFile, MissingModel, InvalidModel: There is none, or it is not whole.
    """
    uri = run.model.uri.rstrip("/")
    if uri.startswith("hf://"):
        # Imported only here: the hub client costs a second that other runs need not wait for.
        from tunewright_trainer import hub

        found = hub.resolve(uri, run.model.revision, stop)
        return ModelInput(uri, found.commit, tuple(model_files.select_files(uri, found.files)), found)
    files = model_files.select_files(uri, storage.listing(uri))
    return ModelInput(uri, model_files.model_version(files), tuple(files))


def find_data(run: TrainRun, storage: Storage) -> dict[str, StoredFile]:
    """Find all data files.

    Raises:
        MissingFile: One is not there.
    """
    return {source.uri: storage.stat(source.uri) for source in _sources(run)}


def fetch_model(model: ModelInput, storage: Storage, folder: Path, stop: Stop, advance: Advance) -> Path:
    """Bring the model to this machine, check it, and return its folder; mounted folders are used where they lie.

    Raises:
        InvalidModel: A file is damaged.
    """
    path = folder
    if model.hub is not None:
        from tunewright_trainer import hub

        hub.download(model.hub, [file.name for file in model.files], folder, stop, advance)
    else:
        mounted = storage.local_path(model.uri)
        if mounted is None:
            storage.download([(join(model.uri, file.name), file, folder / file.name) for file in model.files], advance)
        else:
            path = mounted
            advance(model.size_bytes)
    model_files.check_folder(model.uri, path)
    return path


def fetch_data(
    run: TrainRun, inputs: Inputs, storage: Storage, folder: Path, stop: Stop, advance: Advance
) -> PreparedData:
    """Bring the data to this machine, check every row and write down the rows for the worker.

    Raises:
        InvalidData: Rows or files are unusable.
    """
    paths: dict[str, Path] = {}
    downloads = []
    for index, (uri, file) in enumerate(inputs.data.items()):
        mounted = storage.local_path(uri)
        paths[uri] = mounted or folder / "raw" / f"{index}-{file.name}"
        if mounted is None:
            downloads.append((uri, file, paths[uri]))
        else:
            advance(file.size_bytes)
    storage.download(downloads, advance)
    return dataset.prepare(run.dataset, paths, folder, run.hyperparameters.seed, stop, ignore)


def _sources(run: TrainRun) -> list[DataSource]:
    return [*run.dataset.train, *(run.dataset.validation or [])]
