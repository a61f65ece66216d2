"""Checks a published result from outside: every file against the manifest, and a merged model against its inputs by
merging them again, into nothing but hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright_api.manifest import Manifest, ManifestFile
from tunewright_api.merge_run import MergeRun
from tunewright_api.run_config import HubSettings
from tunewright_api.v1alpha1.adaptermerge import MergeBase
from tunewright_api.v1alpha1.merged import bytes_of
from tunewright_trainer import inputs
from tunewright_trainer.artifact import RUN_DOCUMENT, download_artifact, find_manifest, read_document
from tunewright_trainer.errors import CorruptArtifact, InvalidAdapter, InvalidModel, VerificationFailed, WorkerFailure
from tunewright_trainer.merge.adapter import load_adapter
from tunewright_trainer.merge.base_input import fetch_base, find_base
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.combination import AdapterFolder, CombineTask, run_combination
from tunewright_trainer.merge.inputs import (
    HUB,
    AdapterInput,
    combination_of,
    fetch_adapter,
    find_adapters,
    outputs_of,
    quantization_of,
)
from tunewright_trainer.merge.sinks import WrittenFile
from tunewright_trainer.merge.stream import OutputDtype, merge
from tunewright_trainer.merge.verification import Location, LogitsTask, open_location, run_logits_check
from tunewright_trainer.publish import MERGED_FOLDER
from tunewright_trainer.run_log import RunLog
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import Advance, Stop, StoredFile, ignore

READ_BYTES = 16 * 1024 * 1024
PARALLEL_FILES = 4
CARD = "README.md"
MAX_PROBLEMS = 5


@dataclass(frozen=True)
class Check:
    """What one check gave."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class PublishedResult:
    """A result and what its documents say."""

    manifest: Manifest
    folder: str
    """Of the manifest."""
    document: Mapping[str, Any]
    """run.json."""

    @property
    def merged(self) -> str | None:
        """Folder of a merged model, relative to that of the manifest; None: there is none."""
        folder = f"{self.manifest.writer}/{MERGED_FOLDER}"
        return folder if any(file.path.startswith(f"{folder}/") for file in self.manifest.files) else None

    @property
    def is_merge(self) -> bool:
        """Whether an AdapterMerge made it."""
        return bool(self.document.get("run", {}).get("kind") == "MergeRun")


@dataclass(frozen=True)
class Reference:
    """What a merged model was made of, found again, and how it was made."""

    base: Location
    adapter: Path
    dtype: OutputDtype
    max_shard_bytes: int
    dequantized: BaseQuantization | None
    outputs: Sequence[str] | None


@dataclass(frozen=True)
class Tools:
    """What the checks work with."""

    storage: Storage
    work: Path
    """An empty folder, for adapters and bases of the hub."""
    log: RunLog
    stop: Stop
    local: bool = True


def open_result(uri: str, storage: Storage) -> PublishedResult:
    """Find a published result; raises as `find_manifest` and `read_document` do."""
    manifest, folder = find_manifest(uri, storage)
    document = read_document(storage, folder, manifest, f"{manifest.writer}/{RUN_DOCUMENT}")
    return PublishedResult(manifest, folder, document)


def check_files(result: PublishedResult, storage: Storage, advance: Advance = ignore) -> Check:
    """Read every file that the manifest names, and compare size and SHA-256; nothing is kept."""
    stored = {file.name: file for file in storage.listing(result.folder)}

    def problem(file: ManifestFile) -> str | None:
        found = stored.get(file.path)
        if found is None:
            return f"{file.path} is missing"
        if found.size_bytes != file.bytes:
            return f"{file.path} has {found.size_bytes} bytes, not {file.bytes}"
        digest = _sha256(storage, join(result.folder, file.path), found, advance)
        return None if digest == file.sha256 else f"{file.path} has the SHA-256 {digest}, not {file.sha256}"

    with ThreadPoolExecutor(PARALLEL_FILES, "hash") as pool:
        problems = [found for found in pool.map(problem, result.manifest.files) if found is not None]
    size = f"{len(result.manifest.files)} files, {result.manifest.size_bytes / 1e6:,.1f} MB"
    return Check(
        "files", not problems, _said(problems) if problems else f"{size}: sizes and SHA-256 as in the manifest"
    )


def _sha256(storage: Storage, uri: str, file: StoredFile, advance: Advance) -> str:
    digest = hashlib.sha256()
    for start in range(0, file.size_bytes, READ_BYTES):
        data = storage.read_range(uri, file, start, min(READ_BYTES, file.size_bytes - start))
        digest.update(data)
        advance(len(data))
    return digest.hexdigest()


def check_adapter(result: PublishedResult, tools: Tools) -> Check:
    """Check that an adapter is one: its configuration, and all of its numbers."""
    folder = tools.work / "own-adapter"
    download_artifact(join(result.folder, result.manifest.root), folder, tools.storage)
    try:
        adapter = load_adapter(folder, join(result.folder, result.manifest.root))
    except InvalidAdapter as error:
        return Check("adapter", passed=False, detail=str(error))
    return Check("adapter", passed=True, detail=f"{adapter.kind}, {len(adapter.tensors)} tensors, all of them finite")


def find_reference(result: PublishedResult, tools: Tools) -> Reference:
    """Find adapters and base of a merged model again, in the versions that went in.

    Raises:
        CorruptArtifact: One of them is another one now.
        TrainerError: One cannot be found or read.
    """
    if not result.is_merge:
        return _reference_of_training(result, tools)
    run = _pinned(result.document, tools.local)
    adapters = find_adapters(run, tools.storage, tools.stop, tools.work / "configs")
    _same("adapters", [a["version"] for a in result.document["inputs"]["adapters"]], [a.version for a in adapters])
    base = find_base(run, adapters, tools.storage, tools.stop).model
    _same("base", [result.document["inputs"]["model"]["version"]], [base.version])
    return Reference(
        base=fetch_base(base, run.hub, tools.work / "base", tools.stop, ignore),
        adapter=_one_adapter(run, adapters, tools),
        dtype=run.dtype,
        max_shard_bytes=run.max_shard_bytes,
        dequantized=quantization_of(run, adapters),
        outputs=outputs_of(adapters),
    )


def _pinned(document: Mapping[str, Any], local: bool) -> MergeRun:
    """Return the run document with the versions that went in, where addresses can say them."""
    run = MergeRun.model_validate_json(json.dumps(document["run"]), context={"local": local})
    found, base = document["inputs"]["adapters"], document["inputs"]["model"]
    adapters = [
        source.model_copy(update={"uri": entry["uri"], "revision": _commit(entry)})
        for source, entry in zip(run.adapters, found, strict=True)
    ]
    pinned = MergeBase.model_construct(uri=base["uri"], revision=_commit(base))
    return run.model_copy(update={"adapters": adapters, "base": pinned})


def _commit(entry: Mapping[str, Any]) -> str | None:
    return str(entry["version"]) if str(entry["uri"]).startswith(HUB) else None


def _same(what: str, expected: Sequence[str], found: Sequence[str]) -> None:
    if list(expected) != list(found):
        raise CorruptArtifact(f"{what}: merged were {', '.join(expected)}, and there are {', '.join(found)} now")


def _one_adapter(run: MergeRun, adapters: list[AdapterInput], tools: Tools) -> Path:
    folders = [
        fetch_adapter(adapter, run, tools.storage, tools.work / "adapters" / str(index), tools.stop, ignore)
        for index, adapter in enumerate(adapters)
    ]
    if len(folders) == 1:
        return folders[0]
    task = CombineTask(
        adapters=[AdapterFolder(uri=a.name, path=f) for a, f in zip(adapters, folders, strict=True)],
        combination=combination_of(run, adapters),
        output=tools.work / "adapter",
    )
    run_combination(task, tools.work, os.environ, tools.log, tools.stop)
    return task.output


def _reference_of_training(result: PublishedResult, tools: Tools) -> Reference:
    """Return adapter and base of a training that published both adapter and merged model (output.merge)."""
    document = result.document
    hub, wanted = HubSettings.model_validate(document["run"].get("hub", {})), document["run"]["merge"]
    uri, version = document["inputs"]["model"]["uri"], document["inputs"]["model"]["version"]
    base = inputs.find_model_at(uri, _commit(document["inputs"]["model"]), hub, tools.storage, tools.stop)
    _same("base", [version], [base.version])
    adapter = tools.work / "adapter"
    download_artifact(join(result.folder, result.manifest.root), adapter, tools.storage)
    return Reference(
        base=fetch_base(base, hub, tools.work / "base", tools.stop, ignore),
        adapter=adapter,
        dtype=wanted["dtype"],
        max_shard_bytes=bytes_of(wanted["maxShardSize"]),
        dequantized=None,
        outputs=document.get("outputs"),
    )


class _Hashing:
    """A sink that keeps nothing of a file but its size and SHA-256."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, str]] = {}

    def open(self, name: str, size_bytes: int) -> _HashedFile:
        """Begin a file."""
        return _HashedFile(name, self.files)


class _HashedFile:
    """A file that becomes a hash."""

    def __init__(self, name: str, files: dict[str, tuple[int, str]]) -> None:
        self._name, self._files = name, files
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take the data in."""
        self._digest.update(data)
        self._size += memoryview(data).nbytes

    def finish(self) -> WrittenFile:
        """Note the hash."""
        self._files[self._name] = self._size, self._digest.hexdigest()
        return WrittenFile(self._name, *self._files[self._name])

    def abort(self) -> None:
        """Forget the file."""


def check_weights(result: PublishedResult, reference: Reference, tools: Tools, advance: Advance = ignore) -> Check:
    """Merge again and compare every file: untouched tensors are the base's, the others base and adapter, bit by bit."""
    sink = _Hashing()
    try:
        findings = merge(
            Checkpoint(open_location(reference.base, tools.storage)),
            load_adapter(reference.adapter),
            sink,
            dtype=reference.dtype,
            max_shard_bytes=reference.max_shard_bytes,
            dequantized=reference.dequantized,
            outputs=reference.outputs,
            advance=advance,
            stop=tools.stop,
        )
    except (InvalidAdapter, InvalidModel) as error:
        return Check("weights", passed=False, detail=str(error))
    prefix = f"{result.merged}/"
    published = {
        file.path.removeprefix(prefix): (file.bytes, file.sha256)
        for file in result.manifest.files
        if file.path.startswith(prefix) and file.path != f"{prefix}{CARD}"
    }
    names = sorted({*published, *sink.files})
    problems = [f"{name} is not what merging gives" for name in names if published.get(name) != sink.files.get(name)]
    right = (
        f"base and adapter merge to the same {len(names)} files, bit by bit: {len(findings.changes)} tensors changed, "
        f"{findings.copied_tensors} the base's"
    )
    return Check("weights", not problems, _said(problems) if problems else right)


def check_logits(result: PublishedResult, reference: Reference, tools: Tools) -> Check:
    """Compare logits with those of base and adapter."""
    merged = join(result.folder, str(result.merged))
    task = LogitsTask(
        base=reference.base,
        merged=Location(uri=merged, files=tools.storage.listing(merged)),
        adapter=reference.adapter,
        dequantized=reference.dequantized,
        storage=tools.storage.settings,
        local=tools.local,
    )
    try:
        outcome = run_logits_check(task, tools.work, os.environ, tools.log, tools.stop)
    except WorkerFailure as error:
        if error.worker_reason != VerificationFailed.reason:
            raise
        return Check("logits", passed=False, detail=str(error))
    return Check(
        "logits",
        passed=True,
        detail=f"{outcome.prompts} prompts: at most {outcome.max_divergence:.3g} from base with adapter (allowed "
        f"{outcome.allowed_divergence:.3g}), which is {outcome.effect:.3g} from the base",
    )


def _said(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(problems[:MAX_PROBLEMS]) + more
