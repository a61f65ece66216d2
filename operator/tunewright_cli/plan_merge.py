"""`tunewright plan` of an AdapterMerge: every default filled in, and the Job that the operator would create."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from tunewright_api.merge_run import MergeRun
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge
from tunewright_api.validation import InvalidDocument, parse_adaptermerge
from tunewright_cli.errors import InvalidFile, MissingPackage
from tunewright_cli.settings_table import (
    Manifest,
    Setting,
    print_document,
    print_manifests,
    print_settings,
    settings_of,
)

_FIELDS = ("quantizedBase", "dtype", "maxShardSize")
_PARTS = {name: (name,) for name in ("combination", "verification", "storage", "hub")}


def run(merge: AdapterMerge, output: str) -> None:
    """Print the plan of an AdapterMerge that has a namespace and a UID; arguments and errors as for `plan.run`."""
    merge_run, manifests = _render(merge)
    settings = list(_settings(merge, merge_run))
    if output != "text":
        document = {
            "name": merge.metadata.name,
            "settings": [setting.document() for setting in settings],
            "job": manifests.get("Job"),
        }
        print_document(document, output)
        return
    console = Console(highlight=False)
    console.print(f"[bold]{merge.metadata.name}[/]: {_title(merge)}\n")
    print_settings(console, settings)
    print_manifests(console, manifests)


def _render(merge: AdapterMerge) -> tuple[MergeRun, dict[str, Manifest]]:
    try:
        from tunewright_operator.errors import RunTooLarge
        from tunewright_operator.plan import build_job, plan_merge
        from tunewright_operator.settings import Settings
    except ModuleNotFoundError as error:
        raise MissingPackage(f"plan needs {error.name}: pip install 'tunewright[cli,operator]'") from None
    settings = Settings()
    merge_run = plan_merge(merge, 1, settings)
    if _has_local_paths(merge):
        return merge_run, {}
    try:
        return merge_run, {"Job": build_job(merge, 1, 0, settings)}
    except RunTooLarge as error:
        raise InvalidFile(f"{merge.metadata.name}: {error}") from None


def _has_local_paths(merge: AdapterMerge) -> bool:
    try:
        parse_adaptermerge(merge.document())
    except InvalidDocument:
        return True
    return False


def _settings(merge: AdapterMerge, merge_run: MergeRun) -> Iterator[Setting]:
    written = merge.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    complete = merge.spec.document()
    for name in _FIELDS:
        yield Setting(name, complete[name], name in written)
    yield from settings_of(merge_run.document(), written, _PARTS)


def _title(merge: AdapterMerge) -> str:
    names = ", ".join(
        f"FineTuneJob {adapter.fine_tune_job}" if adapter.fine_tune_job is not None else str(adapter.uri)
        for adapter in merge.spec.adapters
    )
    base = merge.spec.base.uri if merge.spec.base else "the model that the first one was trained on"
    return f"combination of {names}" if merge.spec.output.adapter_only else f"merge of {names} into {base}"
