"""The run's inputs: found and named first (that gives the run key), fetched and checked later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.run_config import HubSettings, TrainRun, run_key
from tunewright_api.v1alpha1.parts import DataSource
from tunewright_trainer import dataset, model_files
from tunewright_trainer.dataset import PreparedData
from tunewright_trainer.start_adapter import StartAdapter
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import Advance, Stop, StoredFile, ignore

if TYPE_CHECKING:
    from tunewright_trainer.hub import HubSnapshot
    from tunewright_trainer.reward_inputs import RewardModelInput


@dataclass(frozen=True)
class ModelInput:
    """The base model as storage describes it."""

    uri: str
    version: str
    """Commit of a hub model, else a digest over the versions of its files."""
    files: tuple[StoredFile, ...]
    hub: HubSnapshot | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the files that are needed."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Inputs:
    """Everything that goes into a run."""

    model: ModelInput
    data: Mapping[str, StoredFile]
    reward_models: tuple[RewardModelInput, ...] = ()
    adapter: StartAdapter | None = None

    @property
    def data_versions(self) -> dict[str, str]:
        """Version and size of every data file, by address."""
        return {uri: f"{file.version}:{file.size_bytes}" for uri, file in self.data.items()}

    @property
    def reward_versions(self) -> dict[str, str]:
        """Digest of every reward model, by URI."""
        return {reward.uri: reward.digest for reward in self.reward_models}

    @property
    def size_bytes(self) -> int:
        """Size of all that is fetched."""
        others = [r.base for r in self.reward_models if r.base is not None and not self.is_own_model(r.base)]
        models = sum(model.size_bytes for model in (self.model, *others))
        rewards = sum(reward.manifest.size_bytes for reward in self.reward_models)
        adapter = self.adapter.size_bytes if self.adapter is not None else 0
        return models + rewards + adapter + sum(file.size_bytes for file in self.data.values())

    def is_own_model(self, model: ModelInput) -> bool:
        """Tell whether a model is the one that is trained."""
        return (model.uri, model.version) == (self.model.uri, self.model.version)

    def key(self, run: TrainRun) -> str:
        """Return the run key."""
        adapter = {self.adapter.uri: self.adapter.digest} if self.adapter is not None else {}
        return run_key(
            run,
            model_version=self.model.version,
            data_versions=self.data_versions,
            artifact_digests={**self.reward_versions, **adapter},
        )


def find_model(run: TrainRun, storage: Storage, stop: Stop) -> ModelInput:
    """Find the base model; see `find_model_at`."""
    return find_model_at(run.model.uri.rstrip("/"), run.model.revision, run.hub, storage, stop)


def find_model_at(uri: str, revision: str | None, settings: HubSettings, storage: Storage, stop: Stop) -> ModelInput:
    """Find a model and choose the files to fetch.

    Raises:
        MissingFile, MissingModel, InvalidModel: There is none, or it is not whole.
    """
    if uri.startswith("hf://"):
        # Imported only here: the hub client costs a second that other runs need not wait for.
        from tunewright_trainer import hub

        repository = uri.removeprefix(hub.MODEL_PREFIX)
        found = hub.resolve("model", repository, revision, settings, stop)
        return ModelInput(uri, found.commit, tuple(model_files.select_files(uri, found.files)), found)
    files = model_files.select_files(uri, storage.listing(uri))
    return ModelInput(uri, model_files.model_version(files), tuple(files))


def find_data(run: TrainRun, storage: Storage, stop: Stop) -> dict[str, StoredFile]:
    """Find all data files, by address.

    Raises:
        MissingFile: One is not there.
    """

    def find(source: DataSource) -> StoredFile:
        if not source.uri.startswith("hf://"):
            return storage.stat(source.uri)
        from tunewright_trainer import hub

        return hub.find_data_file(source.uri, source.revision, run.hub, stop)

    return {source.address: find(source) for source in _sources(run)}


def fetch_model(run: TrainRun, model: ModelInput, storage: Storage, folder: Path, stop: Stop, advance: Advance) -> Path:
    """Bring the model to this machine, check it, and return its folder; mounted folders are used where they lie.

    Raises:
        InvalidModel: A file is damaged.
    """
    path = folder
    if model.hub is not None:
        from tunewright_trainer import hub

        hub.download(model.hub, [file.name for file in model.files], folder, run.hub, stop, advance)
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
    uris = {source.address: source.uri for source in _sources(run)}
    for index, (address, file) in enumerate(inputs.data.items()):
        uri = uris[address]
        if uri.startswith("hf://"):
            paths[address] = _fetch_from_hub(run, uri, file, folder / "raw" / str(index), stop, advance)
        elif (mounted := storage.local_path(uri)) is not None:
            paths[address] = mounted
            advance(file.size_bytes)
        else:
            paths[address] = folder / "raw" / f"{index}-{file.name}"
            downloads.append((uri, file, paths[address]))
    storage.download(downloads, advance)
    seed, objective = run.hyperparameters.seed, run.objective
    return dataset.prepare(run.dataset, paths, folder, seed, stop, ignore, objective.type, objective.reward_columns)


def _fetch_from_hub(run: TrainRun, uri: str, file: StoredFile, folder: Path, stop: Stop, advance: Advance) -> Path:
    from tunewright_trainer import hub

    repository, path = hub.split_data_uri(uri)
    snapshot = hub.HubSnapshot("dataset", repository, file.version)
    hub.download(snapshot, [path], folder, run.hub, stop, advance)
    return folder / path


def _sources(run: TrainRun) -> list[DataSource]:
    return [*run.dataset.train, *(run.dataset.validation or [])]
