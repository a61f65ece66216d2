"""Published reward models that a run learns from: found and named first, fetched and checked before the worker loads
anything. A run without rewards of type Model has none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright_api.manifest import Manifest, digest_of
from tunewright_api.run_config import HubSettings, TrainRun
from tunewright_trainer import inputs, model_files
from tunewright_trainer.artifact import RUN_DOCUMENT, download_artifact, find_manifest, read_document
from tunewright_trainer.errors import CorruptArtifact, InvalidConfiguration, InvalidModel
from tunewright_trainer.inputs import ModelInput
from tunewright_trainer.protocol import RewardModelFolder
from tunewright_trainer.storage import Storage
from tunewright_trainer.transfer import Advance, Stop

ADAPTER_CONFIG = "adapter_config.json"
_HEAD = re.compile(r"(^|\.)(score|classifier)(\.out_proj|\.modules_to_save)?\.weight$")
_REMEDY = "train one with objective.type Reward and give its output here"


@dataclass(frozen=True)
class RewardModelInput:
    """A reward model as storage describes it."""

    uri: str
    folder: str
    """Folder of the manifest: what `uri` led to when it was looked up."""
    manifest: Manifest
    base: ModelInput | None
    """Base of an adapter; None for a whole model."""

    @property
    def digest(self) -> str:
        """Name of its content."""
        return digest_of(self.manifest.to_bytes())


def check_patterns(run: TrainRun) -> None:
    """Let RE2 itself judge the patterns: the rules can check only the greater part of its syntax.

    Raises:
        InvalidConfiguration: One is no RE2 regular expression.
    """
    patterns = {i: source.regex.pattern for i, source in enumerate(run.objective.rewards) if source.regex}
    if not patterns:
        return
    # Imported only here: the worker's start must not wait for it.
    from tunewright_trainer import rewards

    for index, pattern in patterns.items():
        problem = rewards.pattern_problem(pattern)
        if problem is not None:
            raise InvalidConfiguration(f"rewards[{index}].regex.pattern {pattern!r}: {problem}")


def find_reward_models(run: TrainRun, storage: Storage, stop: Stop) -> tuple[RewardModelInput, ...]:
    """Find the reward models, and tell by their configuration whether they are any.

    Raises:
        MissingFile: There is no published result.
        InvalidModel: It is something else than a reward model, or its base is not there any more as it was.
        InvalidConfiguration: A pattern is no RE2 regular expression.
        CorruptArtifact: A file differs from the manifest.
    """
    check_patterns(run)
    uris = [source.model.uri for source in run.objective.rewards if source.model is not None]
    return tuple(_find(uri, run.hub, storage, stop) for uri in uris if uri is not None)


def _find(uri: str, settings: HubSettings, storage: Storage, stop: Stop) -> RewardModelInput:
    manifest, folder = find_manifest(uri, storage)
    if manifest.kind == "Model":
        _check_config(uri, read_document(storage, folder, manifest, f"{manifest.root}/{model_files.CONFIG}"))
        return RewardModelInput(uri, folder, manifest, None)
    task = read_document(storage, folder, manifest, f"{manifest.root}/{ADAPTER_CONFIG}").get("task_type")
    if task != "SEQ_CLS":
        raise InvalidModel(
            f"{uri}: not a reward model: its adapter has no score head (task_type {task!r} in {ADAPTER_CONFIG}, not "
            f"'SEQ_CLS'): {_REMEDY}"
        )
    writer = manifest.root.rpartition("/")[0]
    document = read_document(storage, folder, manifest, f"{writer}/{RUN_DOCUMENT}")
    return RewardModelInput(uri, folder, manifest, _find_base(uri, document, settings, storage, stop))


def _check_config(uri: str, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or ["none"]
    if not str(architectures[0]).endswith("ForSequenceClassification"):
        raise InvalidModel(
            f"{uri}: not a reward model: it has no score head (architecture {architectures[0]} in "
            f"{model_files.CONFIG}): {_REMEDY}"
        )
    # transformers leaves out what is its default, and its default is two labels.
    outputs = len(config.get("id2label") or (0, 1))
    if outputs != 1:
        raise InvalidModel(_other_head(uri, outputs))


def _other_head(uri: str, outputs: int) -> str:
    return f"{uri}: not a reward model: its head gives {outputs} numbers, that of a reward model one: {_REMEDY}"


def _find_base(
    uri: str, document: Mapping[str, Any], settings: HubSettings, storage: Storage, stop: Stop
) -> ModelInput:
    """Find the model that the adapter was trained on."""
    try:
        base_uri = str(document["run"]["model"]["uri"]).rstrip("/")
        version = str(document["inputs"]["model"]["version"])
    except (KeyError, TypeError):
        raise CorruptArtifact(f"{uri}: {RUN_DOCUMENT} does not name the base model of the adapter") from None
    base = inputs.find_model_at(base_uri, version if base_uri.startswith("hf://") else None, settings, storage, stop)
    if base.version != version:
        raise InvalidModel(
            f"{uri}: the reward model was trained on {base_uri} as it was then ({version}), which is {base.version} "
            "now: its scores would mean nothing. Put the base back, or train the reward model again"
        )
    return base


def fetch_reward_models(
    run: TrainRun, found: inputs.Inputs, storage: Storage, folder: Path, stop: Stop, advance: Advance
) -> list[RewardModelFolder]:
    """Bring the reward models and what they are adapters of to this machine, and check every file.

    Args:
        run: The run document.
        found: All inputs; a base that is also the run's own model is not fetched again.
        storage: Where from.
        folder: Where to.
        stop: Ends the work when it is requested.
        advance: Told the bytes fetched.

    Raises:
        InvalidModel: A head is missing or gives another number of values than one.
        CorruptArtifact: A file differs from the manifest.
    """
    fetched = []
    for index, reward in enumerate(found.reward_models):
        path = folder / f"{index}"
        download_artifact(reward.folder, path, storage, advance)
        check_head(reward.uri, path)
        base_path = None
        if reward.base is not None and not found.is_own_model(reward.base):
            base_path = inputs.fetch_model(run, reward.base, storage, folder / f"{index}-base", stop, advance)
        fetched.append(
            RewardModelFolder(
                uri=reward.uri, path=path, is_adapter=reward.manifest.kind == "Adapter", base_path=base_path
            )
        )
    return fetched


def check_head(uri: str, folder: Path) -> None:
    """Look for the score head in the headers of the weights.

    Raises:
        InvalidModel: There is none, or it gives more than one number.
    """
    shapes = {
        name: entry["shape"]
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in model_files.read_header(uri, path).items()
        if _HEAD.search(name)
    }
    if not shapes:
        raise InvalidModel(f"{uri}: not a reward model: there is no score head among its weights: {_REMEDY}")
    outputs = max(shape[0] for shape in shapes.values())
    if outputs != 1:
        raise InvalidModel(_other_head(uri, outputs))
