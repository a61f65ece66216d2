"""The run's inputs: found and named first (that gives the run key), fetched and checked later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.run_config import HubSettings, TrainRun, run_key
from tunewright_api.v1alpha1.parts import DataSource
from tunewright_trainer import dataset, model_files
from tunewright_trainer.dataset import PreparedData
from tunewright_trainer.start_adapter import StartAdapter
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import Advance, Stop, StoredFile

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
class SourceFiles:
    """What a data source stands for: a file, or the files of a split in their order."""

    source: DataSource
    files: tuple[StoredFile, ...]

    @property
    def version(self) -> str:
        """Changes whenever the rows do; the files of a split share a commit."""
        return self.files[0].version

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Inputs:
    """Everything that goes into a run."""

    model: ModelInput
    data: Mapping[str, SourceFiles]
    """By the source's address."""
    reward_models: tuple[RewardModelInput, ...] = ()
    adapter: StartAdapter | None = None
    function_digests: Mapping[str, str] = field(default_factory=dict)
    """Digest of the code of every reward function, by its name."""

    @property
    def data_versions(self) -> dict[str, str]:
        """Version and size of every data source, by address."""
        return {address: f"{found.version}:{found.size_bytes}" for address, found in self.data.items()}

    @property
    def reward_versions(self) -> dict[str, str]:
        """Digest of every reward model, by URI."""
        return {reward.uri: reward.digest for reward in self.reward_models}

    @property
    def data_bytes(self) -> int:
        """Size of the data files."""
        return sum(file.size_bytes for file in self.data.values())

    @property
    def adapter_outputs(self) -> list[str] | None:
        """Names of the outputs of the head of the adapter to go on from."""
        return list(self.adapter.outputs) if self.adapter is not None and self.adapter.outputs is not None else None

    @property
    def size_bytes(self) -> int:
        """Size of all that is fetched."""
        others = [r.base for r in self.reward_models if r.base is not None and not self.is_own_model(r.base)]
        models = sum(model.size_bytes for model in (self.model, *others))
        rewards = sum(reward.manifest.size_bytes for reward in self.reward_models)
        adapter = self.adapter.size_bytes if self.adapter is not None else 0
        return models + rewards + adapter + self.data_bytes

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
            function_digests=self.function_digests,
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


def find_data(run: TrainRun, storage: Storage, stop: Stop) -> dict[str, SourceFiles]:
    """Find the files of all data sources, by address.

    Raises:
        MissingFile: One is not there.
    """

    def find(source: DataSource) -> tuple[StoredFile, ...]:
        if not source.uri.startswith("hf://"):
            return (storage.stat(source.uri),)
        from tunewright_trainer import hub

        return hub.find_data(source, run.hub, stop)

    sources = {source.address: source for source in [*run.dataset.train, *(run.dataset.validation or [])]}
    return {address: SourceFiles(source, find(source)) for address, source in sources.items()}


def fetch_model(run: TrainRun, model: ModelInput, storage: Storage, folder: Path, stop: Stop, advance: Advance) -> Path:
    """Bring the model to this machine, check it, and return its folder; mounted folders are used where they lie.

    Raises:
        InvalidModel: A file is damaged.
    """
    return fetch_model_files(model, run.hub, storage, folder, stop, advance)


def fetch_model_files(
    model: ModelInput, settings: HubSettings, storage: Storage, folder: Path, stop: Stop, advance: Advance
) -> Path:
    """Bring a model to this machine; see `fetch_model`."""
    path = folder
    if model.hub is not None:
        from tunewright_trainer import hub

        hub.download(model.hub, [file.name for file in model.files], folder, settings, stop, advance)
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
    run: TrainRun, inputs: Inputs, storage: Storage, folder: Path, stop: Stop, advance: Advance, checked: Advance
) -> PreparedData:
    """Bring the data to this machine, check every row and write down the rows for the worker.

    Args:
        run: The run document.
        inputs: What was found.
        storage: Where the data lies.
        folder: Where it goes.
        stop: Ends the work when it is requested.
        advance: Told the bytes fetched.
        checked: Told the bytes whose rows are checked.

    Raises:
        InvalidData: Rows or files are unusable.
    """
    paths: dict[str, dict[str, Path]] = {}
    downloads = []
    for index, (address, found) in enumerate(inputs.data.items()):
        uri = found.source.uri
        if uri.startswith("hf://"):
            paths[address] = _fetch_from_hub(run, found, folder / "raw" / str(index), stop, advance)
        elif (mounted := storage.local_path(uri)) is not None:
            paths[address] = {uri: mounted}
            advance(found.size_bytes)
        else:
            (file,) = found.files
            paths[address] = {uri: folder / "raw" / f"{index}-{file.name}"}
            downloads.append((uri, file, paths[address][uri]))
    storage.download(downloads, advance)
    objective = run.objective
    return dataset.prepare(
        run.dataset,
        paths,
        folder,
        run.hyperparameters.seed,
        stop,
        checked,
        objective.type,
        objective.reward_columns,
        inputs.adapter_outputs or objective.labels,
    )


def _fetch_from_hub(run: TrainRun, found: SourceFiles, folder: Path, stop: Stop, advance: Advance) -> dict[str, Path]:
    """Fetch the files of a source; return where each one lies, by its URI."""
    from tunewright_trainer import hub

    repository, _ = hub.split_data_uri(found.source.uri)
    names = [file.name for file in found.files]
    hub.download(hub.HubSnapshot("dataset", repository, found.version), names, folder, run.hub, stop, advance)
    return {f"{hub.DATASET_PREFIX}{repository}/{name}": folder / name for name in names}
