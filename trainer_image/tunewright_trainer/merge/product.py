"""Makes the merged model of one adapter and its base, proves it, and exports it: below the folder of one writer, and
without making anything of it valid."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.manifest import ManifestFile
from tunewright_api.run_report import MergePlan, MergeVerification
from tunewright_api.v1alpha1.merged import GgufType
from tunewright_trainer.attempt import Attempt
from tunewright_trainer.errors import DiskFull
from tunewright_trainer.merge import gate
from tunewright_trainer.merge.adapter import Adapter, load_adapter
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.numbers import FLOATS, ITEM_BYTES, OUTPUT_DTYPES
from tunewright_trainer.merge.readers import StorageReader
from tunewright_trainer.merge.sinks import FileWriter, Sink, StorageSink
from tunewright_trainer.merge.stream import MergeFindings, OutputDtype, merge
from tunewright_trainer.merge.verification import Location, LogitsOutcome, LogitsTask, open_location, run_logits_check
from tunewright_trainer.publish import GGUF_FOLDER, MERGED_FOLDER
from tunewright_trainer.storage import join

if TYPE_CHECKING:
    from tunewright_trainer.merge.gguf_size import Weight
    from tunewright_trainer.merge.gguf_tools import Tools

LOCAL_MODEL_FOLDER = "merged-model"
"""In the work folder: a copy of the merged model, for what needs files."""


@dataclass(frozen=True)
class MergeOrder:
    """What to merge, and how."""

    name: str
    """Of the result, for GGUF files."""
    base: Location
    adapter: Path
    """Folder on this machine."""
    adapter_uri: str
    """Its name in messages."""
    dtype: OutputDtype
    max_shard_bytes: int
    dequantized: BaseQuantization | None = None
    outputs: Sequence[str] | None = None
    """Names of the outputs of a classification head."""
    prompts: Sequence[str] = ()
    max_divergence: float | None = None
    gguf: Sequence[GgufType] = ()
    tools: Tools | None = None
    """For GGUF files."""


@dataclass(frozen=True)
class Product:
    """A merged model that passed all checks; nobody has said yet that it is valid."""

    stored: tuple[ManifestFile, ...]
    """Files in storage; paths are relative to the writer's folder."""
    local: Mapping[str, Path]
    """Files that are still to be uploaded, by name in the writer's folder."""
    plan: MergePlan
    """What is known of it from here: number format, tensors, shards."""
    verification: MergeVerification
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of tools that the result depends on."""


class Producer:
    """One merge at work. Uses the attempt's threads, log and progress."""

    def __init__(self, attempt: Attempt, order: MergeOrder, notes: Sequence[str] = ()) -> None:
        """Prepare; nothing is read yet.

        Args:
            attempt: Whose run key is known: its folder is written to.
            order: What to do.
            notes: What is worth knowing already.
        """
        self._attempt = attempt
        self._order = order
        self._notes = list(notes)
        self._storage = attempt.storage
        self._folder = join(attempt.folder, MERGED_FOLDER)

    def make(self, vllm: Sequence[str] | None = None) -> Product:
        """Merge, check, export.

        Args:
            vllm: What was found of vLLM, for the verification.

        Raises:
            MergeRejected: A check failed.
            InvalidAdapter, InvalidModel: Adapter and base do not go together, or one of them is damaged.
            DiskFull: The exports do not fit.
            TrainerError, OSError: Reading, writing or a process failed.
        """
        order = self._order
        with gate.final_verdict():
            base = Checkpoint(open_location(order.base, self._storage))
            adapter = load_adapter(order.adapter, order.adapter_uri)
            self._check_disk(base)
            findings = self._merge(base, adapter)
            self._notes += gate.check_changes(findings, adapter)
            merged = self._read_back(base, findings)
            outcome = self._compare_logits()
            local = self._export(base)
        plan = MergePlan(
            dtype=order.dtype,
            changed_tensors=len(findings.changes) - len(findings.unchanged),
            total_tensors=len(merged.tensors),
            shards=len({tensor.file for tensor in merged.tensors.values()}),
        )
        stored = tuple(
            ManifestFile(path=f"{MERGED_FOLDER}/{file.name}", bytes=file.bytes, sha256=file.sha256)
            for file in findings.files
        )
        verification = gate.verdict(findings, outcome, vllm, self._notes)
        versions = {"llama.cpp": order.tools.version} if order.tools is not None else {}
        return Product(stored, local, plan, verification, versions)

    def _merge(self, base: Checkpoint, adapter: Adapter) -> MergeFindings:
        attempt, order = self._attempt, self._order
        total = merged_bytes(base, order.dtype)
        attempt.tracker.enter("Merging", f"{total / 1e6:.1f} MB to {self._folder}", total)
        try:
            findings = merge(
                base,
                adapter,
                _Told(StorageSink(self._storage, self._folder), attempt),
                dtype=order.dtype,
                max_shard_bytes=order.max_shard_bytes,
                dequantized=order.dequantized,
                outputs=order.outputs,
                advance=partial(attempt.tracker.advance, "Merging"),
                stop=attempt.stop,
            )
        except OSError as error:
            # Nothing is written but the merged files.
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFull(f"no space left at {attempt.run.output_uri}: free some, or write elsewhere") from None
        attempt.log.say(
            f"merged: {len(findings.changes)} tensors changed, {findings.copied_tensors} copied, "
            f"{findings.converted_tensors} converted, {findings.adapter_tensors} tensors of the adapter used"
        )
        return findings

    def _read_back(self, base: Checkpoint, findings: MergeFindings) -> Checkpoint:
        self._attempt.tracker.enter("Verifying", "reading back what was stored")
        listing = self._storage.listing(self._folder)
        gate.check_sizes(findings, {file.name: file.size_bytes for file in listing}, self._folder)
        merged = Checkpoint(StorageReader(self._storage, self._folder, listing))
        gate.check_stored(base, merged, findings)
        return merged

    def _compare_logits(self) -> LogitsOutcome:
        attempt, order = self._attempt, self._order
        attempt.tracker.enter("Verifying", "comparing logits with those of base and adapter")
        task = LogitsTask(
            base=order.base,
            merged=Location(uri=self._folder, files=self._storage.listing(self._folder)),
            adapter=order.adapter,
            prompts=list(order.prompts),
            max_divergence=order.max_divergence,
            dequantized=order.dequantized,
            storage=attempt.run.storage,
            local=attempt.settings.local,
            pvc_root=attempt.settings.pvc_root,
        )
        settings = attempt.settings
        outcome = run_logits_check(task, settings.work, settings.environment, attempt.log, attempt.stop)
        attempt.log.say(
            f"logits of {outcome.prompts} prompts: {outcome.max_divergence:.3g} from base with adapter (allowed "
            f"{outcome.allowed_divergence:.3g}), which is {outcome.effect:.3g} from the base; {outcome.seconds:.0f} s"
        )
        return outcome

    def _export(self, base: Checkpoint) -> dict[str, Path]:
        attempt, order = self._attempt, self._order
        if not order.gguf:
            return {}
        # Imported only here: it takes numpy's and the converter's tables along.
        from tunewright_trainer.merge import gguf

        assert order.tools is not None
        model = self._local_model()
        attempt.tracker.enter("Exporting", ", ".join(order.gguf))
        made = gguf.export(
            model,
            order.gguf,
            attempt.settings.work / GGUF_FOLDER,
            name=order.name,
            tools=order.tools,
            stop=attempt.stop,
            environment=attempt.settings.environment,
            log=attempt.log.worker_line,
            progress=lambda done, total: attempt.tracker.enter(
                "Exporting", ", ".join(order.gguf), percent=round(100 * min(1.0, done / max(1, total)), 1)
            ),
            uri=self._folder,
        )
        for file in made:
            attempt.log.say(file.note())
            self._notes.append(file.note())
        return {f"{GGUF_FOLDER}/{file.path.name}": file.path for file in made}

    def _local_model(self) -> Path:
        """Return the merged model as a folder on this machine."""
        mounted = self._storage.local_path(self._folder)
        if mounted is not None:
            return mounted
        folder = self._attempt.settings.work / LOCAL_MODEL_FOLDER
        files = self._storage.listing(self._folder)
        total = sum(file.size_bytes for file in files)
        self._attempt.tracker.enter("Exporting", "fetching the merged model", total)
        self._storage.download(
            [(join(self._folder, file.name), file, folder / file.name) for file in files],
            partial(self._attempt.tracker.advance, "Exporting"),
        )
        return folder

    def _check_disk(self, base: Checkpoint) -> None:
        """Compare what passes through the work folder with the room there is."""
        order, work = self._order, self._attempt.settings.work
        needs_copy = (order.gguf or self._attempt.run.hub_output) and self._storage.local_path(self._folder) is None
        needed = merged_bytes(base, order.dtype) if needs_copy else 0
        what = ["the merged model"] if needs_copy else []
        if order.gguf:
            from tunewright_trainer.merge import gguf

            needed += gguf.space_needed(_weights(base, order.dtype), order.gguf)
            what.append(f"export.gguf ({', '.join(order.gguf)})")
        check_disk(work, needed, " and ".join(what))


class _Told:
    """A sink that says which file it is at."""

    def __init__(self, sink: Sink, attempt: Attempt) -> None:
        self._sink = sink
        self._attempt = attempt

    def open(self, name: str, size_bytes: int) -> FileWriter:
        """Begin a file."""
        self._attempt.tracker.tell(name)
        return self._sink.open(name, size_bytes)


def check_disk(work: Path, needed_bytes: int, what: str) -> None:
    """Refuse what would not fit.

    Raises:
        DiskFull: It does not.
    """
    free = shutil.disk_usage(work).free
    if needed_bytes > free:
        raise DiskFull(
            f"{what} takes {needed_bytes / 1e9:.3f} GB of {work}, which has {free / 1e9:.3f} GB left: raise "
            "resources.ephemeralStorage"
        )


def merged_bytes(base: Checkpoint, dtype: OutputDtype) -> int:
    """Return about how many bytes of weights a merged model has."""
    return sum(weight.elements * ITEM_BYTES[weight.dtype] for weight in _weights(base, dtype))


def _weights(base: Checkpoint, dtype: OutputDtype) -> list[Weight]:
    from tunewright_trainer.merge.gguf_size import Weight

    target = None if dtype == "Auto" else OUTPUT_DTYPES[dtype]
    return [
        Weight(t.name, target if target is not None and t.dtype in FLOATS else t.dtype, t.shape)
        for t in base.tensors.values()
    ]
