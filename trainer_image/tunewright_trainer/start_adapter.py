"""The adapter that a run goes on from (model.continueFrom): found and judged before anything large is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright_api.manifest import MANIFEST_NAME, Manifest, digest_of
from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.method import MethodType
from tunewright_api.v1alpha1.spec_rules import COMPARED_WITH_START, FORMATS, WITH_HEAD
from tunewright_trainer.artifact import RUN_DOCUMENT, download_artifact, find_manifest, read_document
from tunewright_trainer.errors import CorruptArtifact, InvalidAdapter, MissingFile
from tunewright_trainer.fields import listed
from tunewright_trainer.protocol import REWARD_OUTPUTS
from tunewright_trainer.publish import load_manifest
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.transfer import Advance

FIELD = "model.continueFrom"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PEFT_TYPES: dict[MethodType, str] = {"LoRA": "LORA", "QLoRA": "LORA", "IA3": "IA3"}


@dataclass(frozen=True)
class StartAdapter:
    """A published adapter as its manifest describes it."""

    uri: str
    """As the run document has it."""
    manifest_uri: str
    manifest: Manifest
    digest: str
    """SHA-256 of the manifest."""
    warning: str | None = None
    """What may be wrong and cannot be told from here."""
    outputs: tuple[str, ...] | None = None
    """Names of the outputs of its head, in their order; None: it has none."""

    @property
    def notes(self) -> list[str]:
        """Return what a reader of the log should know."""
        return [f"going on from {self.manifest_uri}", *([f"warning: {self.warning}"] if self.warning else [])]

    @property
    def size_bytes(self) -> int:
        """Size of the files that are fetched."""
        return sum(file.bytes for file in self.manifest.files if file.path.startswith(f"{self.manifest.root}/"))


def find(run: TrainRun, storage: Storage) -> StartAdapter | None:
    """Find the adapter that the run goes on from, None where it starts from the base model.

    Raises:
        MissingFile: There is no published result at the URI.
        InvalidAdapter: The result is damaged, no adapter, or one that the run cannot go on from.
    """
    reference = run.model.continue_from
    if reference is None:
        return None
    assert reference.uri is not None, "the operator resolves names, the command line refuses them"
    try:
        manifest, folder = find_manifest(reference.uri, storage)
        manifest_uri = join(folder, MANIFEST_NAME)
        loaded = load_manifest(storage, manifest_uri)
    except MissingFile as error:
        raise MissingFile(f"{FIELD}: {error}") from None
    except CorruptArtifact as error:
        raise InvalidAdapter(f"{FIELD}: {error}") from None
    if loaded is None or loaded[0] != manifest:
        raise MissingFile(f"{FIELD}: {manifest_uri} was replaced or deleted meanwhile: start the run again")
    try:
        config = _config(storage, folder, manifest)
        _check_kind(run, reference.uri, config)
        outputs = _outputs(run, reference.uri, storage, folder, manifest) if _has_head(config) else None
    except CorruptArtifact as error:
        raise InvalidAdapter(f"{FIELD}: {error}") from None
    warning = _check_base(run, reference.uri, str(config.get("base_model_name_or_path") or ""))
    return StartAdapter(reference.uri, manifest_uri, manifest, digest_of(loaded[1]), warning, outputs)


def fetch(adapter: StartAdapter | None, storage: Storage, folder: Path, advance: Advance) -> Path | None:
    """Bring the adapter to this machine, check every byte of it, and return its folder.

    Raises:
        InvalidAdapter: A file is missing or differs from the manifest.
    """
    if adapter is None:
        return None
    try:
        fetched = download_artifact(adapter.manifest_uri, folder, storage, advance)
    except CorruptArtifact as error:
        raise InvalidAdapter(f"{FIELD}: {error}") from None
    if fetched != adapter.manifest:
        raise CorruptArtifact(f"{adapter.manifest_uri} was replaced during the download")
    return folder


def _config(storage: Storage, folder: str, manifest: Manifest) -> dict[str, Any]:
    if manifest.kind != "Adapter":
        raise InvalidAdapter(
            f"{FIELD}: {join(folder, manifest.root)} is a whole model, not an adapter: "
            f"give this folder as model.uri, without {FIELD}"
        )
    names = {file.path for file in manifest.files}
    for name in (CONFIG, WEIGHTS):
        if f"{manifest.root}/{name}" not in names:
            raise InvalidAdapter(f"{FIELD}: {join(folder, MANIFEST_NAME)} names no {manifest.root}/{name}")
    return read_document(storage, folder, manifest, f"{manifest.root}/{CONFIG}")


def _check_kind(run: TrainRun, uri: str, config: dict[str, Any]) -> None:
    kind, wanted = config.get("peft_type"), _PEFT_TYPES[run.method]
    if kind != wanted:
        raise InvalidAdapter(
            f"{FIELD}: {uri} is an adapter of kind {kind!r}, method.type {run.method} trains one of kind {wanted!r}: "
            "set method.type to the method that made it"
        )
    objective = run.objective.type
    if objective in COMPARED_WITH_START and config.get("bias", "none") != "none":
        raise InvalidAdapter(
            f"{FIELD}: {uri} has trained bias terms (lora.bias), which objective {objective} cannot go on from: they "
            "would move in its reference as well. Train an adapter without them first"
        )
    if _has_head(config) != (objective in WITH_HEAD):
        made = "a reward model or classifier, whose head gives no tokens" if _has_head(config) else "a language model"
        others = [kind for kind in FORMATS if kind not in WITH_HEAD]
        raise InvalidAdapter(
            f"{FIELD}: {uri} is {made}: objective {objective} goes on from adapters of "
            + ("its own kind, which have its head: leave it out" if objective in WITH_HEAD else listed(others))
        )


def _has_head(config: dict[str, Any]) -> bool:
    return config.get("task_type") == "SEQ_CLS"


def _outputs(run: TrainRun, uri: str, storage: Storage, folder: str, manifest: Manifest) -> tuple[str, ...]:
    """Return what the outputs of the adapter's head are, which only the run that made it knows."""
    writer = manifest.root.rpartition("/")[0]
    document = read_document(storage, folder, manifest, f"{writer}/{RUN_DOCUMENT}")
    outputs = tuple(str(name) for name in document.get("outputs") or ())
    kind, wanted = run.objective.type, None
    if not outputs or (outputs == REWARD_OUTPUTS) != (kind == "Reward"):
        wanted = "a reward model's one" if kind == "Reward" else "a classifier's"
    elif run.objective.classification is not None and run.objective.classification.labels is not None:
        labels = run.objective.classification.labels
        wanted = None if tuple(labels) == outputs else f"{listed(labels)} (objective.classification.labels)"
    if wanted is not None:
        raise InvalidAdapter(
            f"{FIELD}: {uri} has a head with the outputs {listed(outputs)}, objective {kind} goes on from {wanted}: "
            "a head's outputs keep their meaning and their order"
        )
    return outputs


def _check_base(run: TrainRun, uri: str, base: str) -> str | None:
    """Refuse an adapter of another base model; return a warning where two names may mean the same model.

    Bases of one kind (both on the hub, both in S3, ...) under two names are two models. A hub model and a bucket may
    hold copies of each other; names do not tell.
    """
    own = run.model.uri.removeprefix("hf://").rstrip("/")
    if base == own:
        return None
    if _place(base) == _place(own):
        raise InvalidAdapter(
            f"{FIELD}: {uri} is an adapter of {base or 'an unnamed model'}, model.uri is {own}: "
            "an adapter works on its own base model only, so set model.uri to that"
        )
    return (
        f"{FIELD}: {uri} was trained on {base or 'a base model without a name'}, model.uri is {own}: make sure that "
        "these are copies of the same model"
    )


def _place(base: str) -> str:
    scheme, separator, _ = base.partition("://")
    if separator:
        return scheme
    return "path" if base.startswith(("/", "./", "../")) or not base else "hub"
