"""What has to be true of a merged model before it is published, as far as numbers in files show it.

The findings of the merge are compared with the adapter, and the stored files with the findings and the base. Whether
the model gives the logits of base and adapter is the matter of verification.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tunewright_api.run_report import MergeVerification
from tunewright_trainer.errors import MergeRejected, VerificationFailed, WorkerFailure
from tunewright_trainer.fields import listed
from tunewright_trainer.merge.adapter import Adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.stream import MergeFindings
from tunewright_trainer.merge.verification import LogitsOutcome
from tunewright_trainer.tracker import finite

MAX_NAMES = 4
MAX_NOTES = 16
MAX_NOTE_CHARACTERS = 1024
COMPARED_BYTES = 64 * 1024 * 1024
"""Of the tensors that the adapter does not change, those are read again and compared with the base's, smallest first,
until so many bytes are: norms, biases and routers of any model."""
_END = "; nothing is published"
_ZERO_MEANS_NOTHING = (".lora_B", ".lora_embedding_B")
_FACTOR = ".ia3_l"


@contextmanager
def final_verdict() -> Iterator[None]:
    """Make a failed check the end of the matter: the same merge would give the same files.

    Raises:
        MergeRejected: In place of what says that a check has failed.
    """
    try:
        yield
    except VerificationFailed as error:
        raise MergeRejected(str(error)) from None
    except WorkerFailure as error:
        if error.worker_reason != VerificationFailed.reason:
            raise
        raise MergeRejected(str(error)) from None


def check_changes(findings: MergeFindings, adapter: Adapter) -> list[str]:
    """Check that the merge did something wherever the adapter says so.

    Returns:
        What a reader of the result should know.

    Raises:
        MergeRejected: The merged model is the base, or a tensor of it is although the adapter changes it.
    """
    if findings.adapter_tensors != len(adapter.tensors):
        raise MergeRejected(
            f"{findings.adapter_tensors} of {len(adapter.tensors)} tensors of {adapter.uri} were used{_END}"
        )
    unchanged = [change for change in findings.changes if not change.changed]
    if len(unchanged) == len(findings.changes):
        lost = any(change.relative_delta > 0 for change in unchanged)
        why = (
            "its changes are smaller than a rounding step: merge with dtype Float32"
            if lost
            else "all of its changes are 0: it was saved before it was trained, or its training changed nothing"
        )
        raise MergeRejected(f"the merged model would be identical to the base of {adapter.uri}: {why}{_END}")
    lost_names = [change.name for change in unchanged if change.relative_delta > 0]
    if lost_names:
        raise MergeRejected(
            f"the change of {_some(lost_names)} is lost in rounding, so that the merged model lacks a part of the "
            f"adapter: merge with dtype Float32{_END}"
        )
    if not unchanged:
        return []
    # The adapter itself must have this in it: a merge that left a layer out would look the same.
    if len(unchanged) > sum(_changes_nothing(adapter, name) for name in adapter.tensors):
        raise MergeRejected(
            f"{_some([change.name for change in unchanged])} of the merged model are still the base's, although the "
            f"adapter changes them{_END}"
        )
    return [f"{len(unchanged)} of {len(findings.changes)} tensors keep the base's values: the adapter's change is 0"]


def _changes_nothing(adapter: Adapter, name: str) -> bool:
    if any(part in name for part in _ZERO_MEANS_NOTHING):
        return not adapter.load(name).any()
    return _FACTOR in name and bool((adapter.load(name) == 1).all())


def check_sizes(findings: MergeFindings, stored: Mapping[str, int], folder_uri: str) -> None:
    """Compare what storage has with what was written.

    Raises:
        MergeRejected: A file is missing or has another size, or there is one more.
    """
    written = {file.name: file.bytes for file in findings.files}
    if stored == written:
        return
    wrong = sorted({name for name in {*stored, *written} if stored.get(name) != written.get(name)})
    raise MergeRejected(f"{folder_uri}: storage does not have what was written: {_some(wrong)}{_END}")


def check_stored(base: Checkpoint, merged: Checkpoint, findings: MergeFindings) -> None:
    """Compare the merged tensors in storage with the base's: none is missing, none is there that should not be, those
    that the adapter does not change have their shapes and, as far as that is cheap, their bytes.

    Raises:
        MergeRejected: Something is wrong.
    """
    changes = {change.name for change in findings.changes}
    expected = set(base.tensors) - set(findings.dropped_tensors)
    if "quantization_config" in base.config:
        # What belongs to a quantized weight in the base's files is not in the merged ones.
        expected &= set(merged.tensors)
    missing = sorted((expected | changes) - set(merged.tensors))
    if missing:
        raise MergeRejected(f"the merged model lacks {_some(missing)}{_END}")
    more = sorted(set(merged.tensors) - expected - changes)
    if len(more) > findings.untied:
        raise MergeRejected(f"the merged model has {_some(more)}, which neither base nor adapter have{_END}")
    untouched = sorted(expected - changes, key=lambda name: (base.tensors[name].length, name))
    left = COMPARED_BYTES
    for name in untouched:
        own, before = merged.tensors[name], base.tensors[name]
        if own.shape != before.shape and "quantization_config" not in base.config:
            raise MergeRejected(
                f"{name} has shape {list(own.shape)} in the merged model, {list(before.shape)} in the base{_END}"
            )
        left -= own.length
        if own.dtype == before.dtype and left >= 0 and not _equal(base, merged, name):
            raise MergeRejected(f"{name} differs from the base's, although the adapter does not change it{_END}")


def _equal(base: Checkpoint, merged: Checkpoint, name: str) -> bool:
    own, before = merged.tensors[name], base.tensors[name]
    one = merged.reader.read(own.file, own.start, own.length)
    return one == base.reader.read(before.file, before.start, before.length)


def verdict(
    findings: MergeFindings, outcome: LogitsOutcome | None, vllm: Sequence[str] | None, notes: Sequence[str]
) -> MergeVerification:
    """Return what was proved of a model that passed all checks.

    Args:
        findings: Of the merge.
        outcome: Of the comparison of logits.
        vllm: Why vLLM cannot serve the adapters as they are; None: nobody asked.
        notes: What else is worth knowing.
    """
    deltas = [d for change in findings.changes if change.changed and math.isfinite(d := change.relative_delta)]
    known = [*(outcome.notes if outcome is not None else ()), *notes]
    return MergeVerification(
        passed=True,
        adapter_tensors=findings.adapter_tensors,
        changed_tensors=len(findings.changes) - len(findings.unchanged),
        copied_tensors=findings.copied_tensors,
        smallest_change=finite(min(deltas)) if deltas else None,
        largest_change=finite(max(deltas)) if deltas else None,
        prompts=outcome.prompts if outcome is not None else 0,
        max_divergence=outcome.max_divergence if outcome is not None else None,
        allowed_divergence=outcome.allowed_divergence if outcome is not None else None,
        effect=outcome.effect if outcome is not None else None,
        vllm=short(vllm) if vllm is not None else None,
        notes=short(known) or None,
    )


def short(lines: Sequence[str]) -> list[str]:
    """Return as many lines, and as much of each, as a report holds."""
    return [line[:MAX_NOTE_CHARACTERS] for line in lines[:MAX_NOTES]]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return listed(list(names[:MAX_NAMES])) + more
