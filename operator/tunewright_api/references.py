"""References to results of other runs, wherever they stand in a spec or run document. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tunewright_api.base import SpecModel
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec
from tunewright_api.v1alpha1.parts import ArtifactRef

Part = TypeVar("Part", bound=SpecModel)


def references(part: SpecModel) -> tuple[ArtifactRef, ...]:
    """Return every reference in a part of a document, in the order of its fields."""
    found: list[ArtifactRef] = []

    def note(reference: ArtifactRef) -> ArtifactRef:
        found.append(reference)
        return reference

    _changed(part, note)
    return tuple(found)


def referred_jobs(part: SpecModel) -> tuple[str, ...]:
    """Return the names of the FineTuneJobs that are referred to, each once."""
    return tuple(dict.fromkeys(r.fine_tune_job for r in references(part) if r.fine_tune_job is not None))


def referred_merge(spec: SpecModel) -> str | None:
    """Return the name of the AdapterMerge whose merged model is trained, None where there is none."""
    return spec.model.from_merge if isinstance(spec, FineTuneJobSpec) else None


def with_merged_model(spec: FineTuneJobSpec, uri: str) -> FineTuneJobSpec:
    """Return the spec with the address of a merged model in place of the name of its AdapterMerge."""
    return spec.model_copy(update={"model": spec.model.model_copy(update={"from_merge": None, "uri": uri})})


def with_results(part: Part, manifest_uris: Mapping[str, str]) -> Part:
    """Return the part with the addresses of results in place of the names of FineTuneJobs.

    Args:
        part: A spec, or a part of one.
        manifest_uris: Address of a result's manifest, by name; names that are not in it stay.
    """

    def resolved(reference: ArtifactRef) -> ArtifactRef:
        uri = manifest_uris.get(reference.fine_tune_job) if reference.fine_tune_job is not None else None
        return reference if uri is None else reference.model_copy(update={"fine_tune_job": None, "uri": uri})

    result: Part = _changed(part, resolved)
    return result


def with_digests(part: Part, digests: Mapping[str, str]) -> Part:
    """Return the part with the digest of each result in place of its address: what it is instead of where it lies."""
    result: Part = _changed(part, lambda reference: reference.model_copy(update={"uri": digests[str(reference.uri)]}))
    return result


def _changed(value: Any, change: Callable[[ArtifactRef], ArtifactRef]) -> Any:
    """Return a copy with every reference changed; what holds none is not copied."""
    if isinstance(value, ArtifactRef):
        return change(value)
    if isinstance(value, SpecModel):
        changes = {name: new for name, old in value.__dict__.items() if (new := _changed(old, change)) is not old}
        return value.model_copy(update=changes) if changes else value
    if isinstance(value, list):
        items = [_changed(item, change) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
