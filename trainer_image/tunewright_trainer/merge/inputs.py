"""What goes into a merge: adapters and their base, found and pinned before anything large is fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright_api.manifest import MANIFEST_NAME, Manifest, digest_of
from tunewright_api.merge_run import MergeRun
from tunewright_api.v1alpha1.adaptermerge import AdapterSource
from tunewright_trainer import model_files
from tunewright_trainer.artifact import (
    MAX_DOCUMENT_BYTES,
    RUN_DOCUMENT,
    download_artifact,
    find_manifest,
    read_document,
)
from tunewright_trainer.errors import CorruptArtifact, InvalidAdapter, InvalidConfiguration, MissingFile
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.combination import Combination
from tunewright_trainer.publish import load_manifest
from tunewright_trainer.start_adapter import CONFIG, WEIGHTS
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import Advance, Stop, StoredFile

if TYPE_CHECKING:
    from tunewright_trainer.hub import HubSnapshot

HUB = "hf://"
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SIDE_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_PICKLE = "adapter_model.bin"


@dataclass(frozen=True)
class TrainedOn:
    """The base model of an adapter, as far as the adapter says."""

    uri: str
    version: str | None = None
    """Commit of a hub model, or digest over the files' versions; None: it does not say."""
    revision: str | None = None
    """Branch or tag of a hub model whose commit is not known."""


@dataclass(frozen=True)
class AdapterInput:
    """An adapter as storage or hub describe it."""

    field: str
    """Where the document names it, for messages."""
    uri: str
    """As the document has it."""
    place: str
    """Its manifest, or its folder where it has none."""
    version: str
    """Digest of its manifest or over its files' versions, or the commit on the hub."""
    config: Mapping[str, Any]
    """Content of adapter_config.json."""
    weight: float
    manifest: Manifest | None = None
    """None: a folder that peft wrote."""
    files: tuple[StoredFile, ...] = ()
    """Those of a folder without a manifest."""
    hub: HubSnapshot | None = None
    base: TrainedOn | None = None
    quantization: BaseQuantization | None = None
    """How the base was quantized in training; None: not at all, or nobody knows."""
    outputs: tuple[str, ...] | None = None
    """Names of the outputs of its head, in their order; None: it has none, or nobody knows."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.field}: {self.uri}"

    @property
    def size_bytes(self) -> int:
        """Size of the files that are fetched."""
        if self.manifest is not None:
            return sum(file.bytes for file in self.manifest.files if file.path.startswith(f"{self.manifest.root}/"))
        return sum(file.size_bytes for file in self.files)


def find_adapters(run: MergeRun, storage: Storage, stop: Stop, scratch: Path) -> list[AdapterInput]:
    """Find all adapters of a merge; raises as `find_adapter` does."""
    return [find_adapter(source, i, run, storage, stop, scratch) for i, source in enumerate(run.adapters)]


def find_adapter(
    source: AdapterSource, index: int, run: MergeRun, storage: Storage, stop: Stop, scratch: Path
) -> AdapterInput:
    """Find one adapter: a published result by its manifest, or a folder that peft wrote.

    Args:
        source: The reference.
        index: Its place in the document.
        run: The document.
        storage: Where adapters lie.
        stop: Ends waits for the hub.
        scratch: Folder for the configuration of one on the hub.

    Raises:
        MissingFile, MissingModel: Nothing is there.
        InvalidAdapter: What is there is damaged, or no adapter.
        AccessDenied, StorageUnavailable: It cannot be read.
    """
    field = f"adapters[{index}]"
    assert source.uri is not None, "the operator resolves names, the command line refuses them"
    weight = 1.0 if source.weight is None else source.weight
    if source.uri.startswith(HUB):
        return _on_hub(field, source, weight, run, stop, scratch / str(index))
    try:
        manifest, folder = find_manifest(source.uri, storage)
    except MissingFile as error:
        return _in_folder(field, source.uri, weight, storage, error)
    except CorruptArtifact as error:
        raise InvalidAdapter(f"{field}: {error}") from None
    return _published(field, source.uri, weight, storage, manifest, folder)


def _published(field: str, uri: str, weight: float, storage: Storage, manifest: Manifest, folder: str) -> AdapterInput:
    manifest_uri = join(folder, MANIFEST_NAME)
    if manifest.kind != "Adapter":
        raise InvalidAdapter(
            f"{field}: {join(folder, manifest.root)} is a whole model, not an adapter: only adapters are merged; one "
            "that is to be merged into this model takes it as base"
        )
    names = {file.path for file in manifest.files}
    for name in (CONFIG, WEIGHTS):
        if f"{manifest.root}/{name}" not in names:
            raise InvalidAdapter(f"{field}: {manifest_uri} names no {manifest.root}/{name}")
    try:
        loaded = load_manifest(storage, manifest_uri)
        config = read_document(storage, folder, manifest, f"{manifest.root}/{CONFIG}")
        document = read_document(storage, folder, manifest, f"{manifest.root.rpartition('/')[0]}/{RUN_DOCUMENT}")
    except CorruptArtifact as error:
        raise InvalidAdapter(f"{field}: {error}") from None
    if loaded is None or loaded[0] != manifest:
        raise MissingFile(f"{field}: {manifest_uri} was replaced or deleted meanwhile: start the merge again")
    model = document.get("inputs", {}).get("model", {})
    base = TrainedOn(model["uri"], model.get("version")) if "uri" in model else None
    given = document.get("run", {}).get("quantization") or document.get("quantization")
    return AdapterInput(
        field=field,
        uri=uri,
        place=manifest_uri,
        version=digest_of(loaded[1]),
        config=config,
        weight=weight,
        manifest=manifest,
        base=base,
        quantization=_quantization(given) if given else None,
        outputs=tuple(map(str, document.get("outputs") or ())) or None,
    )


def _quantization(given: Mapping[str, Any]) -> BaseQuantization:
    return BaseQuantization(given.get("bits", 4), given.get("type", "NF4"), given.get("doubleQuant", True))


def _in_folder(field: str, uri: str, weight: float, storage: Storage, unpublished: MissingFile) -> AdapterInput:
    uri = uri.rstrip("/")
    files = {file.name: file for file in storage.listing(uri) if "/" not in file.name}
    if not files:
        raise MissingFile(f"{field}: {unpublished}; nor is there an adapter that peft wrote") from None
    _check_names(field, uri, files)
    stored = storage.read(join(uri, CONFIG), MAX_DOCUMENT_BYTES)
    if stored is None:
        raise MissingFile(f"{field}: {uri}/{CONFIG} was deleted meanwhile")
    config = _parsed(f"{field}: {uri}", stored[0])
    chosen = _chosen(files)
    return AdapterInput(
        field, uri, uri, model_files.model_version(chosen), config, weight, files=chosen, base=_base_of(config, storage)
    )


def _on_hub(field: str, source: AdapterSource, weight: float, run: MergeRun, stop: Stop, scratch: Path) -> AdapterInput:
    # Imported only here: the hub client costs a second that other runs need not wait for.
    from tunewright_trainer import hub

    uri = str(source.uri)
    found = hub.resolve("model", uri.removeprefix(HUB), source.revision, run.hub, stop)
    files = {file.name: file for file in found.files if "/" not in file.name}
    _check_names(field, uri, files)
    hub.download(found, [CONFIG], scratch, run.hub, stop, lambda size: None)
    config = _parsed(f"{field}: {uri}", (scratch / CONFIG).read_bytes())
    return AdapterInput(
        field, uri, uri, found.commit, config, weight, files=_chosen(files), hub=found, base=_base_of(config, None)
    )


def _check_names(field: str, uri: str, files: Mapping[str, StoredFile]) -> None:
    if CONFIG not in files:
        what = "this is a whole model, not an adapter" if model_files.CONFIG in files else f"there are {_some(files)}"
        raise InvalidAdapter(f"{field}: {uri}: no {CONFIG}: {what}")
    if WEIGHTS not in files:
        pickle = f"the weights are a pickle ({_PICKLE}), which is never loaded: save them as safetensors"
        raise InvalidAdapter(
            f"{field}: {uri}: no {WEIGHTS}: {pickle if _PICKLE in files else f'there are {_some(files)}'}"
        )


def _some(names: Mapping[str, StoredFile]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _chosen(files: Mapping[str, StoredFile]) -> tuple[StoredFile, ...]:
    """Leave out pickles, code and optimizer states."""
    return tuple(file for name, file in sorted(files.items()) if name == WEIGHTS or name.endswith(_SIDE_FILES))


def _parsed(where: str, data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except ValueError as error:
        raise InvalidAdapter(f"{where}/{CONFIG}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{where}/{CONFIG}: must be a JSON object")
    return config


def _base_of(config: Mapping[str, Any], storage: Storage | None) -> TrainedOn | None:
    """Return what a configuration says of its base, where that is an address that means the same everywhere."""
    name, revision = str(config.get("base_model_name_or_path") or "").rstrip("/"), config.get("revision")
    if name.startswith(("s3://", "pvc://")):
        return TrainedOn(name)
    if _HUB_NAME.fullmatch(name):
        is_commit = isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None
        return TrainedOn(f"{HUB}{name}", revision if is_commit else None, revision)
    if name.startswith("/") and storage is not None and storage.is_local:
        return TrainedOn(name)
    return None


def combination_of(run: MergeRun, adapters: list[AdapterInput]) -> Combination:
    """Return how several adapters become one."""
    given = run.combination
    assert given is not None, "the document has the defaults of several adapters"
    return Combination(
        type=given.type,
        weights=[adapter.weight for adapter in adapters],
        density=given.density,
        svd_rank=given.svd_rank,
        seed=given.seed or 0,
    )


def quantization_of(run: MergeRun, adapters: list[AdapterInput]) -> BaseQuantization | None:
    """Return how to quantize the base before the merge, None for not at all.

    Raises:
        InvalidConfiguration: quantizedBase is Dequantized, and what the adapters saw cannot be told, or was not one.
    """
    if run.quantized_base == "Original":
        return None
    found = {adapter.quantization for adapter in adapters}
    if None in found:
        adapter = next(adapter for adapter in adapters if adapter.quantization is None)
        raise InvalidConfiguration(
            f"quantizedBase is Dequantized, but {adapter.name} is not the result of a FineTuneJob of method QLoRA, "
            "which would say how its base was quantized: use Original"
        )
    if len(found) > 1:
        raise InvalidConfiguration(
            "quantizedBase is Dequantized, but the adapters were trained on bases quantized in different ways: use "
            "Original"
        )
    return found.pop()


def outputs_of(adapters: list[AdapterInput]) -> tuple[str, ...] | None:
    """Return the names of the outputs of the adapters' head, where they have one and say so."""
    return next((adapter.outputs for adapter in adapters if adapter.outputs is not None), None)


def fetch_adapter(
    adapter: AdapterInput, run: MergeRun, storage: Storage, folder: Path, stop: Stop, advance: Advance
) -> Path:
    """Bring an adapter to this machine and return its folder; a published one is checked byte by byte.

    Raises:
        InvalidAdapter: A file is missing or differs from the manifest.
        CorruptArtifact: It was replaced meanwhile.
    """
    if adapter.hub is not None:
        from tunewright_trainer import hub

        hub.download(adapter.hub, [file.name for file in adapter.files], folder, run.hub, stop, advance)
    elif adapter.manifest is None:
        storage.download([(join(adapter.uri, file.name), file, folder / file.name) for file in adapter.files], advance)
    else:
        try:
            fetched = download_artifact(adapter.place, folder, storage, advance)
        except CorruptArtifact as error:
            raise InvalidAdapter(f"{adapter.field}: {error}") from None
        if fetched != adapter.manifest:
            raise CorruptArtifact(f"{adapter.place} was replaced during the download")
    return folder
