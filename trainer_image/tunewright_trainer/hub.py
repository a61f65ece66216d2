"""Base models from the Hugging Face Hub (hf://organisation/name)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from tunewright_trainer.errors import AccessDenied, MissingModel, StorageUnavailable
from tunewright_trainer.transfer import Advance, Stop, StoredFile

RETRY_SECONDS = 90.0
"""How long one call is repeated while the hub does not answer."""
TOKEN_HINT = "put a token with access into HF_TOKEN of the Secret"  # noqa: S105 - a hint, not a token

T = TypeVar("T")


@dataclass(frozen=True)
class HubModel:
    """One commit of a repository."""

    repository: str
    commit: str
    files: tuple[StoredFile, ...]


def resolve(uri: str, revision: str | None, stop: Stop, *, retry_seconds: float = RETRY_SECONDS) -> HubModel:
    """Find the commit that a revision means now, and its files.

    Raises:
        MissingModel: There is no such repository or revision.
        AccessDenied: The repository is gated or private, or the token is not valid.
        StorageUnavailable: The hub does not answer.
    """
    repository = uri.removeprefix("hf://")

    def call() -> HubModel:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        files = tuple(StoredFile(s.rfilename, s.size or 0, s.blob_id or "") for s in info.siblings or ())
        return HubModel(repository, info.sha or "", files)

    return _retried(uri, revision, stop, retry_seconds, call)


def download(
    model: HubModel,
    names: Sequence[str],
    target: Path,
    stop: Stop,
    advance: Advance,
    *,
    retry_seconds: float = RETRY_SECONDS,
) -> None:
    """Fetch files of a commit into a folder; raises as `resolve` does."""
    disable_progress_bars()
    ended = threading.Event()
    watcher = threading.Thread(target=_report_growth, args=(target, advance, ended), name="hub-progress", daemon=True)
    watcher.start()
    try:
        _retried(
            f"hf://{model.repository}",
            model.commit,
            stop,
            retry_seconds,
            lambda: snapshot_download(
                model.repository, revision=model.commit, allow_patterns=list(names), local_dir=target
            ),
        )
    finally:
        ended.set()
        watcher.join()


def _report_growth(folder: Path, advance: Advance, ended: threading.Event) -> None:
    """Report bytes as they land on disk: the hub client has no callback for them."""
    known = 0
    while not ended.wait(0.5):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
        advance(size - known)
        known = size


def _retried(uri: str, revision: str | None, stop: Stop, retry_seconds: float, call: Callable[[], T]) -> T:
    deadline = time.monotonic() + retry_seconds
    delay = 1.0
    while True:
        stop.check()
        try:
            return call()
        except RevisionNotFoundError:
            raise MissingModel(f"{uri}: the repository has no revision {revision!r}: set model.revision") from None
        except GatedRepoError:
            raise AccessDenied(f"{uri} is gated: accept its terms on the hub, then {TOKEN_HINT}") from None
        except RepositoryNotFoundError:
            raise MissingModel(
                f"{uri}: the hub has no such model, or it is private: check the name, or {TOKEN_HINT}"
            ) from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise AccessDenied(f"{uri}: the hub answered {status}: {TOKEN_HINT}") from None
            if status < 500 and status != 429:
                raise MissingModel(f"{uri}: the hub answered {status}") from None
            cause = f"the hub answered {status}"
        except OfflineModeIsEnabled:
            raise StorageUnavailable(f"{uri}: HF_HUB_OFFLINE is set, so the hub is not asked") from None
        except (httpx2.TransportError, LocalEntryNotFoundError) as error:
            cause = f"no connection to the hub ({type(error).__name__})"
        if time.monotonic() + delay > deadline:
            raise StorageUnavailable(f"{uri}: {cause}, all retries included")
        stop.sleep(delay)
        delay = min(delay * 2, 15.0)
