"""The base model of a merge, in the version that its adapters were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunewright_api.merge_run import MergeRun
from tunewright_api.run_config import HubSettings
from tunewright_trainer import inputs
from tunewright_trainer.errors import InvalidAdapter
from tunewright_trainer.inputs import ModelInput
from tunewright_trainer.merge.inputs import HUB, AdapterInput
from tunewright_trainer.merge.verification import Location
from tunewright_trainer.storage import Storage
from tunewright_trainer.transfer import Advance, Stop


@dataclass(frozen=True)
class BaseInput:
    """The base model, and what is worth knowing about it."""

    model: ModelInput
    notes: tuple[str, ...] = ()


def find_base(run: MergeRun, adapters: list[AdapterInput], storage: Storage, stop: Stop) -> BaseInput:
    """Find the base: the given one, or that of the first adapter, in the version that the adapters were trained on.

    Raises:
        InvalidAdapter: The adapters were trained on another model, or on another version of it.
        MissingFile, MissingModel, InvalidModel: There is no whole model.
    """
    first = adapters[0]
    if run.base is not None:
        uri, revision = run.base.uri.rstrip("/"), run.base.revision
        if revision is None and first.base is not None and first.base.uri == uri and uri.startswith(HUB):
            revision = first.base.version or first.base.revision
    elif first.base is not None:
        uri = first.base.uri
        revision = (first.base.version or first.base.revision) if uri.startswith(HUB) else None
    else:
        named = first.config.get("base_model_name_or_path")
        raise InvalidAdapter(
            f"{first.name} names {f'{named!r}, which is no address,' if named else 'no model'} as its base model: "
            "give the model as base"
        )
    model = inputs.find_model_at(uri, revision, run.hub, storage, stop)
    notes = [_check_base(adapter, model, is_given=run.base is not None) for adapter in adapters]
    return BaseInput(model, tuple(note for note in notes if note is not None))


def _check_base(adapter: AdapterInput, model: ModelInput, *, is_given: bool) -> str | None:
    """Refuse another base than the adapter's; return a warning where that cannot be told."""
    base = adapter.base
    if base is None:
        return f"warning: {adapter.name} does not say which model it was trained on: make sure that it is {model.uri}"
    if base.uri != model.uri:
        if not is_given:
            raise InvalidAdapter(
                f"{adapter.name} was trained on {base.uri}, the first adapter on {model.uri}: adapters of different "
                "models cannot be merged together; where both are the same model, name it as base"
            )
        return (
            f"warning: {adapter.name} was trained on {base.uri}, base is {model.uri}: make sure that these are copies "
            "of the same model"
        )
    if base.version is None:
        return f"warning: {adapter.name} does not say which version of {model.uri} it was trained on"
    if base.version != model.version:
        if model.hub is not None:
            remedy = f"set base.revision to {base.version}"
        else:
            remedy = "restore its files, or name the folder with the right ones as base"
        raise InvalidAdapter(
            f"{adapter.name} was trained on another revision of {model.uri}: on {base.version}, and the one to merge "
            f"into is {model.version}: {remedy}"
        )
    return None


def check_together(adapters: list[AdapterInput]) -> None:
    """Refuse adapters that are to be combined although they were trained on different models.

    Raises:
        InvalidAdapter: Two bases, or two versions of one.
    """
    known = [adapter for adapter in adapters if adapter.base is not None]
    for adapter in known[1:]:
        first = known[0]
        assert first.base is not None
        assert adapter.base is not None
        versions = {first.base.version, adapter.base.version} - {None}
        if adapter.base.uri == first.base.uri and len(versions) > 1:
            raise InvalidAdapter(
                f"{adapter.name} was trained on {adapter.base.uri} at {adapter.base.version}, {first.name} at "
                f"{first.base.version}: adapters of different versions of a model cannot be combined"
            )


def fetch_base(base: ModelInput, settings: HubSettings, folder: Path, stop: Stop, advance: Advance) -> Location:
    """Bring a base from the hub to this machine; one in storage is read where it lies."""
    if base.hub is None:
        return Location(uri=base.uri, files=base.files)
    from tunewright_trainer import hub

    hub.download(base.hub, [file.name for file in base.files], folder, settings, stop, advance)
    return Location(uri=base.uri, path=folder)
