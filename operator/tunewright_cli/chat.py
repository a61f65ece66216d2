"""`tunewright chat`: a quick look at a base model, an adapter or a merged model."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import typer

from tunewright_api.manifest import Manifest
from tunewright_api.run_config import HubSettings
from tunewright_cli.errors import InvalidArgument, TrainerFailure
from tunewright_cli.get_adapter import fetching
from tunewright_cli.storage import storage_settings, trainer_errors

if TYPE_CHECKING:
    from tunewright_trainer.inputs import ModelInput
    from tunewright_trainer.storage import Storage

HUB = "hf://"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "config.json"
_RUN_DOCUMENT = "run.json"
_ADAPTER_SUFFIXES = (".json", ".jinja", ".txt", ".model")


class Answers(Protocol):
    """A loaded model; see `tunewright_trainer.generation.Speaker`."""

    @property
    def has_chat_template(self) -> bool:
        """Whether turns of a conversation can be told apart."""

    @property
    def description(self) -> str:
        """Device and number format."""

    def answer(
        self, turns: Sequence[dict[str, str]], *, max_tokens: int, temperature: float, say: Callable[[str], None]
    ) -> str:
        """Answer the last turn."""


@dataclass(frozen=True)
class Settings:
    """How the conversation is held."""

    system: str | None
    max_tokens: int
    temperature: float
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Base:
    """What an adapter says of its base model."""

    uri: str
    revision: str | None = None


@dataclass(frozen=True)
class Local:
    """A model or an adapter whose files are on this machine."""

    path: Path
    base: Base | None = None
    """Base of an adapter; None: a whole model."""


def run(
    uri: str,
    prompts: Sequence[str],
    settings: Settings,
    *,
    base: str | None,
    revision: str | None,
    endpoint: str | None,
    region: str | None,
) -> None:
    """Load what the URI leads to and answer the prompts, or else line by line what stdin says.

    Raises:
        InvalidArgument: There is no model or adapter, or options do not go with it.
        TrainerFailure: Storage or hub refuse, or files are damaged.
    """
    storage_here = storage_settings(endpoint=endpoint, region=region)
    with tempfile.TemporaryDirectory(prefix="tunewright-chat-") as folder, trainer_errors():
        from tunewright_trainer.storage import Storage

        finder = Finder(Storage(storage_here, local=True), Path(folder))
        found = finder.find(_place(uri), revision)
        model, adapter, name = found, None, uri
        if base is not None and found.base is None:
            raise InvalidArgument(f"{uri} is a whole model: --base is for adapters")
        if found.base is not None:
            own = Base(_place(base)) if base is not None else found.base
            model, adapter, name = finder.find_base(own), found.path, own.uri
            typer.echo(f"adapter {uri} on {own.uri}{f' at {own.revision}' if own.revision else ''}", err=True)
        check_predicts_tokens(found.path, uri)
        speaker = load(model.path, adapter, settings.device, name)
        typer.echo(f"{name} is loaded ({speaker.description})", err=True)
        converse(speaker, prompts or None, settings)


def load(model: Path, adapter: Path | None, device: Literal["auto", "cpu", "cuda"], name: str) -> Answers:
    """Load a model; it takes the time of importing PyTorch."""
    from tunewright_trainer import generation

    return generation.load(model, adapter, device, name)


def converse(speaker: Answers, prompts: Sequence[str] | None, settings: Settings) -> None:
    """Print the answers to prompts, each by itself, or to the lines of stdin, as one conversation.

    Raises:
        InvalidArgument: A system prompt, and the model knows no roles.
    """
    if settings.system is not None and not speaker.has_chat_template:
        raise InvalidArgument("--system: the model has no chat template, so it knows no system prompt: leave it out")
    start = [{"role": "system", "content": settings.system}] if settings.system is not None else []
    turns = list(start)
    for text in prompts if prompts is not None else _lines(sys.stdin):
        # Without a template nothing tells the turns apart: each line is continued by itself.
        if prompts is not None or not speaker.has_chat_template:
            turns = list(start)
        turns.append({"role": "user", "content": text})
        answer = speaker.answer(turns, max_tokens=settings.max_tokens, temperature=settings.temperature, say=_say)
        turns.append({"role": "assistant", "content": answer})
        _say("\n")


def check_predicts_tokens(folder: Path, uri: str) -> None:
    """Refuse classifiers and reward models: their heads give numbers.

    Raises:
        InvalidArgument: It is one.
    """
    adapter = _read(folder / ADAPTER_CONFIG)
    architectures = _read(folder / _CONFIG).get("architectures") or [""]
    if adapter.get("task_type") == "SEQ_CLS" or str(architectures[0]).endswith("Classification"):
        raise InvalidArgument(f"{uri} is a classifier or a reward model, whose head gives no tokens to talk with")


class Finder:
    """Finds models and adapters, and brings them to this machine: hub models into the hub client's cache, what is on
    this machine is used where it lies, and the rest goes into a folder."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        self._count = 0

    def find(self, uri: str, revision: str | None) -> Local:
        """Find what a URI leads to: a model or adapter on the hub, a published result, a folder of files.

        Raises:
            InvalidArgument: It is neither a model nor an adapter, or has no revisions.
            TrainerError: Storage or hub refuse, or files are damaged.
        """
        from tunewright_trainer.artifact import find_manifest
        from tunewright_trainer.errors import MissingFile

        if uri.startswith(HUB):
            return self._on_hub(uri, revision)
        if revision is not None:
            raise InvalidArgument(f"--revision is for models on the hub, {uri} is none")
        try:
            manifest, folder = find_manifest(uri, self._storage)
        except MissingFile:
            return self._in_folder(uri)
        return self._published(manifest, folder)

    def find_base(self, base: Base) -> Local:
        """Find the base of an adapter.

        Raises:
            TrainerFailure: It is not where the adapter says.
            InvalidArgument: It is an adapter itself.
        """
        from tunewright_trainer.errors import TrainerError, fate_of

        try:
            found = self.find(base.uri, base.revision)
        except (TrainerError, InvalidArgument) as error:
            code = fate_of(error)[0] if isinstance(error, TrainerError) else InvalidArgument.exit_code
            message = f"the adapter's base model: {error}. Say with --base where it is"
            raise TrainerFailure(message, int(code)) from None
        if found.base is not None:
            raise InvalidArgument(f"{base.uri} is an adapter, no base model: give the model below it as --base")
        return found

    def _on_hub(self, uri: str, revision: str | None) -> Local:
        from tunewright_trainer import hub, model_files
        from tunewright_trainer.inputs import find_model_at
        from tunewright_trainer.transfer import Stop

        settings, stop = HubSettings(), Stop()
        snapshot = hub.resolve("model", uri.removeprefix(HUB), revision, settings, stop)
        names = [file.name for file in snapshot.files]
        if ADAPTER_CONFIG in names:
            path = hub.download_to_cache(snapshot, _adapter_files(uri, names), settings, stop)
            return Local(path, _base_of(uri, path))
        model = find_model_at(uri, snapshot.commit, settings, self._storage, stop)
        path = hub.download_to_cache(snapshot, [file.name for file in model.files], settings, stop)
        model_files.check_folder(uri, path)
        return Local(path)

    def _published(self, manifest: Manifest, folder: str) -> Local:
        """Take a published result; what is fetched is verified."""
        from tunewright_trainer.artifact import download_artifact
        from tunewright_trainer.storage import join

        uri = join(folder, manifest.root)
        path = self._storage.local_path(uri)
        if path is None:
            path = self._new_folder()
            total = sum(file.bytes for file in manifest.files if file.path.startswith(f"{manifest.root}/"))
            with fetching(total, path) as advance:
                download_artifact(folder, path, self._storage, advance)
        if manifest.kind == "Model":
            return Local(path)
        return Local(path, self._base_in_run(manifest, folder) or _base_of(uri, path))

    def _base_in_run(self, manifest: Manifest, folder: str) -> Base | None:
        """Return the base model, with the commit that was trained on, as the run that made an adapter has it."""
        from tunewright_trainer.artifact import read_document

        name = f"{manifest.root.rpartition('/')[0]}/{_RUN_DOCUMENT}"
        if all(file.path != name for file in manifest.files):
            return None
        model = read_document(self._storage, folder, manifest, name).get("inputs", {}).get("model", {})
        uri, version = model.get("uri"), model.get("version")
        if not isinstance(uri, str):
            return None
        return Base(uri, version if uri.startswith(HUB) else None)

    def _in_folder(self, uri: str) -> Local:
        from tunewright_trainer.inputs import fetch_model_files, find_model_at
        from tunewright_trainer.storage import join
        from tunewright_trainer.transfer import Stop

        files = {file.name: file for file in self._storage.listing(uri) if "/" not in file.name}
        if ADAPTER_CONFIG in files:
            path = self._storage.local_path(uri)
            if path is None:
                path = self._new_folder()
                chosen = [files[name] for name in _adapter_files(uri, files)]
                with fetching(sum(file.size_bytes for file in chosen), path) as advance:
                    self._storage.download([(join(uri, f.name), f, path / f.name) for f in chosen], advance)
            return Local(path, _base_of(uri, path))
        if _CONFIG not in files:
            raise InvalidArgument(_nothing(uri, files))
        model: ModelInput = find_model_at(uri, None, HubSettings(), self._storage, Stop())
        with fetching(model.size_bytes, self._folder, quiet=self._storage.local_path(uri) is not None) as advance:
            return Local(fetch_model_files(model, HubSettings(), self._storage, self._new_folder(), Stop(), advance))

    def _new_folder(self) -> Path:
        self._count += 1
        return self._folder / str(self._count)


def _place(uri: str) -> str:
    """Return a URI as it is, and a path as an absolute one."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())


def _nothing(uri: str, names: Iterable[str]) -> str:
    there = ", ".join(sorted(names)[:8]) or "nothing"
    return (
        f"{uri} is neither a model ({_CONFIG}) nor an adapter ({ADAPTER_CONFIG}) nor a published result "
        f"(manifest.json, latest.json): there is {there}"
    )


def _adapter_files(uri: str, names: Iterable[str]) -> list[str]:
    top = [name for name in names if "/" not in name]
    if ADAPTER_WEIGHTS not in top:
        raise InvalidArgument(f"{uri}: an adapter without {ADAPTER_WEIGHTS}; pickles are never loaded")
    return [name for name in top if name == ADAPTER_WEIGHTS or name.endswith(_ADAPTER_SUFFIXES)]


def _base_of(uri: str, folder: Path) -> Base:
    """Return the base that an adapter's own configuration names: a path, a URI or a name on the hub."""
    config = _read(folder / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"{uri}: {ADAPTER_CONFIG} names no base model: give it as --base")
    if "://" in name:
        return Base(name)
    if name.startswith(("/", "./", "../")) or Path(name).is_dir():
        return Base(_place(name))
    return Base(HUB + name, config.get("revision"))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidArgument(f"{path}: not valid JSON: {error}") from None
    return document if isinstance(document, dict) else {}


def _lines(source: Iterable[str]) -> Iterator[str]:
    """Give what is said on stdin, line by line until its end; on a terminal with a mark where to write."""
    _invite()
    for line in source:
        if line.strip():
            yield line.rstrip("\n")
        _invite()


def _invite() -> None:
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)


def _say(text: str) -> None:
    typer.echo(text, nl=False)
