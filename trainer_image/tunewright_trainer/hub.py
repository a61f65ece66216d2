"""The Hugging Face Hub, or a server with its API: base models (hf://organisation/name), data sets
(hf://datasets/organisation/name) and files of them. The token is the one that the hub client finds in HF_TOKEN."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from tunewright_api.run_config import HubSettings
from tunewright_api.v1alpha1.parts import DEFAULT_SPLIT, DataSource
from tunewright_trainer.errors import (
    AccessDenied,
    HubUnavailable,
    InvalidConfiguration,
    InvalidInput,
    MissingFile,
    MissingModel,
    TrainerError,
)
from tunewright_trainer.hub_splits import README, split_files
from tunewright_trainer.transfer import Advance, Stop, StoredFile, ignore

RETRY_SECONDS = 90.0
"""How long is waited in all between the tries of one call while the hub does not answer."""
MODEL_PREFIX = "hf://"
DATASET_PREFIX = "hf://datasets/"

_RETRIED = (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError, ConnectionError, RuntimeError)
"""ConnectionError is Xet's word for all that goes wrong on the way; RuntimeError wraps the errors of upload threads."""

Kind = Literal["model", "dataset"]
T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What a call to the hub is about, for its messages."""

    uri: str
    noun: str
    revision: str | None
    revision_field: str
    missing: type[InvalidInput]


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a repository."""

    kind: Kind
    repository: str
    commit: str
    files: tuple[StoredFile, ...] = ()


def connect(settings: HubSettings) -> HfApi:
    """Return the client of a hub."""
    disable_progress_bars()
    # Its warnings quote upload addresses, and a signed address is a credential.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if settings.endpoint is not None:
        # Xet is the storage service of huggingface.co; the client would upload to it whatever the endpoint is. Git LFS
        # over HTTP is what every server with the Hub's API speaks.
        constants.HF_HUB_DISABLE_XET = True
    return HfApi(endpoint=settings.endpoint)


def split_data_uri(uri: str) -> tuple[str, str]:
    """Return repository and path of hf://datasets/organisation/name/path; no path, for a whole data set, is empty."""
    organisation, name, *path = uri.removeprefix(DATASET_PREFIX).split("/", 2)
    return f"{organisation}/{name}", "".join(path)


def resolve(
    kind: Kind,
    repository: str,
    revision: str | None,
    settings: HubSettings,
    stop: Stop,
    *,
    retry_seconds: float = RETRY_SECONDS,
) -> HubSnapshot:
    """Find the commit that a revision means now, and its files.

    Raises:
        MissingModel, MissingFile: There is no such model or data set, or no such revision.
        AccessDenied: The repository is gated or private, or the token is not valid.
        InvalidConfiguration: The hub knows no such names.
        HubUnavailable: The hub does not answer.
    """
    subject = _subject(kind, repository, revision)
    api = connect(settings)

    def call() -> HubSnapshot:
        if kind == "model":
            model = api.model_info(repository, revision=revision, files_metadata=True)
            commit, siblings = model.sha, model.siblings
        else:
            data = api.dataset_info(repository, revision=revision, files_metadata=True)
            commit, siblings = data.sha, data.siblings
        files = tuple(StoredFile(s.rfilename, s.size or 0, s.blob_id or "") for s in siblings or ())
        return HubSnapshot(kind, repository, commit or "", files)

    return retried(subject, settings, stop, call, retry_seconds=retry_seconds)


def find_data(source: DataSource, settings: HubSettings, stop: Stop) -> tuple[StoredFile, ...]:
    """Describe the file of a data set that a source names, or those of its split; their version is the commit.

    Raises as `resolve` does, and:

    Raises:
        MissingFile: The data set has no such file or split.
        InvalidInput: Which files a split has cannot be told; see `split_files`.
    """
    repository, path = split_data_uri(source.uri)
    snapshot = resolve("dataset", repository, source.revision, settings, stop)
    files = {file.name: StoredFile(file.name, file.size_bytes, snapshot.commit) for file in snapshot.files}
    if source.is_data_set:
        readme = _readme(snapshot, settings, stop) if README in files else ""
        return tuple(files[name] for name in split_files(source.uri, files, readme, source.split or DEFAULT_SPLIT))
    if path in files:
        return (files[path],)
    shown = ", ".join(list(files)[:10]) or "none"
    raise MissingFile(
        f"{source.uri}: the data set has no file {path!r} at commit {snapshot.commit[:12]}; its files: {shown}"
    )


def _readme(snapshot: HubSnapshot, settings: HubSettings, stop: Stop) -> str:
    with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
        download(snapshot, [README], Path(folder), settings, stop, ignore)
        return (Path(folder) / README).read_text(encoding="utf-8", errors="replace")


def download(
    snapshot: HubSnapshot,
    names: Sequence[str],
    target: Path,
    settings: HubSettings,
    stop: Stop,
    advance: Advance,
    *,
    retry_seconds: float = RETRY_SECONDS,
) -> None:
    """Fetch files of a commit into a folder; raises as `resolve` does."""
    subject = _subject(snapshot.kind, snapshot.repository, snapshot.commit)
    connect(settings)

    def call() -> None:
        snapshot_download(
            snapshot.repository,
            repo_type=snapshot.kind,
            revision=snapshot.commit,
            allow_patterns=list(names),
            local_dir=target,
            endpoint=settings.endpoint,
        )
        # After some errors the client takes a folder as it finds it.
        absent = [name for name in names if not (target / name).is_file()]
        if absent:
            raise LocalEntryNotFoundError(f"{', '.join(absent)} did not come")

    ended = threading.Event()
    watcher = threading.Thread(target=_report_growth, args=(target, advance, ended), name="hub-progress", daemon=True)
    watcher.start()
    try:
        retried(subject, settings, stop, call, retry_seconds=retry_seconds)
    finally:
        ended.set()
        watcher.join()


def download_to_cache(
    snapshot: HubSnapshot,
    names: Sequence[str],
    settings: HubSettings,
    stop: Stop,
    *,
    retry_seconds: float = RETRY_SECONDS,
) -> Path:
    """Fetch files of a commit into the hub client's own cache, where they stay, and return their folder; raises as
    `resolve` does."""
    subject = _subject(snapshot.kind, snapshot.repository, snapshot.commit)
    connect(settings)

    def call() -> Path:
        folder = snapshot_download(
            snapshot.repository,
            repo_type=snapshot.kind,
            revision=snapshot.commit,
            allow_patterns=list(names),
            endpoint=settings.endpoint,
        )
        return Path(folder)

    return retried(subject, settings, stop, call, retry_seconds=retry_seconds)


def _report_growth(folder: Path, advance: Advance, ended: threading.Event) -> None:
    """Report bytes as they land on disk: the hub client has no callback for them."""
    known = 0
    while not ended.wait(0.5):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
        advance(size - known)
        known = size


def _subject(kind: Kind, repository: str, revision: str | None) -> Subject:
    if kind == "model":
        return Subject(f"{MODEL_PREFIX}{repository}", "model", revision, "the model's revision", MissingModel)
    return Subject(f"{DATASET_PREFIX}{repository}", "data set", revision, "the data source's revision", MissingFile)


def retried(
    subject: Subject, settings: HubSettings, stop: Stop, call: Callable[[], T], *, retry_seconds: float = RETRY_SECONDS
) -> T:
    """Make a call, repeat it while the hub does not answer, and say what a refusal means; raises as `resolve` does."""
    waited, delay = 0.0, 1.0
    while True:
        stop.check()
        try:
            return call()
        except HFValidationError as error:
            raise InvalidConfiguration(f"{subject.uri}: {error}") from None
        except OfflineModeIsEnabled:
            raise HubUnavailable(f"{subject.uri}: HF_HUB_OFFLINE is set, so the hub is not asked") from None
        except _RETRIED as error:
            cause = _transient(subject, settings, error)
        if waited + delay > retry_seconds:
            raise HubUnavailable(f"{subject.uri}: {cause}, all retries included")
        stop.sleep(delay)
        waited, delay = waited + delay, min(delay * 2, 15.0)


def _transient(subject: Subject, settings: HubSettings, error: Exception) -> str:
    """Return what is wrong with a hub that may answer later; raise what is final."""
    inner = error.__cause__ if isinstance(error, RuntimeError | LocalEntryNotFoundError) else None
    if isinstance(inner, HfHubHTTPError | httpx2.TransportError):
        error = inner
    elif isinstance(error, RuntimeError):
        raise error
    if not isinstance(error, HfHubHTTPError):
        said = f": {error}" if isinstance(error, ConnectionError) else ""
        return f"no connection to the hub ({type(error).__name__}{said})"
    status = error.response.status_code
    if status >= 500 or status in (408, 429):
        return f"the hub answered {status}"
    raise _refusal(subject, settings, error, status) from None


def _refusal(subject: Subject, settings: HubSettings, error: HfHubHTTPError, status: int) -> TrainerError:
    uri, hint = subject.uri, _token_hint(settings)
    if isinstance(error, RevisionNotFoundError):
        what = f"the repository has no revision {subject.revision!r}: set {subject.revision_field}"
        return subject.missing(f"{uri}: {what}")
    if isinstance(error, GatedRepoError):
        return AccessDenied(f"{uri} is gated: accept its terms on the hub, then {hint}")
    if isinstance(error, RepositoryNotFoundError):
        private = "it is private" if get_token() is None else "the token may not read it"
        return subject.missing(f"{uri}: the hub has no such {subject.noun}, or {private}: check the name, or {hint}")
    said = f" ({error.server_message})" if error.server_message else ""
    if status in (401, 403):
        return AccessDenied(f"{uri}: the hub answered {status}{said}: {hint}")
    return subject.missing(f"{uri}: the hub answered {status}{said}")


def _token_hint(settings: HubSettings) -> str:
    if settings.secret_name is not None:
        return f"put a token with access under the key `token` of Secret {settings.secret_name}"
    return "name a Secret with an access token (key `token`) in hub.secretName; in a local run, set HF_TOKEN"
