"""Models from a hub: a small server on this machine answers as the Hugging Face Hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from tunewright_trainer import hub
from tunewright_trainer.errors import AccessDenied, MissingModel, StorageUnavailable, TrainerError
from tunewright_trainer.transfer import Stop, ignore

COMMIT = "c" * 40
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"tensors", "evil.bin": b"pickle"}
REFUSALS = {
    "gone": (404, "RepoNotFound"),
    "private": (401, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "old": (404, "RevisionNotFound"),
    "forbidden": (403, ""),
    "down": (503, ""),
}


class Handler(BaseHTTPRequestHandler):
    """Knows org/model, and one name for every way to refuse."""

    def do_HEAD(self) -> None:
        """Describe a file."""
        self._answer(head=True)

    def do_GET(self) -> None:
        """Answer an API call or send a file."""
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.split("/")[4] if path.startswith("/api/") else path.split("/")[2]
        if name in REFUSALS:
            status, code = REFUSALS[name]
            self._send(status, b"{}", {"X-Error-Code": code} if code else {}, head)
        elif "/resolve/" in path:
            content = FILES[path.rpartition("/")[2]]
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, head)
        elif "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES.items()]
            self._send(200, json.dumps(tree).encode(), {}, head)
        else:
            siblings = [{"rfilename": n, "size": len(c), "blobId": "0" * 40} for n, c in FILES.items()]
            document = {"id": "org/model", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(200, json.dumps(document).encode(), {}, head)

    def _send(self, status: int, body: bytes, headers: dict[str, str], head: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture(autouse=True)
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Points the hub client to the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def test_a_model_is_pinned_and_fetched(tmp_path: Path) -> None:
    """The revision becomes a commit, and only the files that were chosen are fetched."""
    model = hub.resolve("hf://org/model", None, Stop())
    assert (model.repository, model.commit) == ("org/model", COMMIT)
    assert {file.name: file.size_bytes for file in model.files} == {n: len(c) for n, c in FILES.items()}
    hub.download(model, ["config.json", "model.safetensors"], tmp_path / "model", Stop(), ignore)
    fetched = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    assert fetched == {"config.json": FILES["config.json"], "model.safetensors": b"tensors"}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone", MissingModel, "hf://org/gone: the hub has no such model, or it is private: check the name, or put"),
        ("private", MissingModel, "hf://org/private: the hub has no such model, or it is private"),
        ("gated", AccessDenied, "hf://org/gated is gated: accept its terms on the hub, then put a token"),
        ("old", MissingModel, "hf://org/old: the repository has no revision 'v1': set model.revision"),
        ("forbidden", AccessDenied, "hf://org/forbidden: the hub answered 403: put a token"),
        ("down", StorageUnavailable, "hf://org/down: the hub answered 503, all retries included"),
    ],
)
def test_a_refusal_is_explained(name: str, error: type[TrainerError], message: str) -> None:
    """What the hub refuses is told with what to do; an outage is retried by a new attempt."""
    with pytest.raises(error) as caught:
        hub.resolve(f"hf://org/{name}", "v1", Stop(), retry_seconds=0.1)
    assert str(caught.value).startswith(message)


def test_no_connection_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached is no mistake of the user."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="no connection to the hub"):
        hub.resolve("hf://org/model", None, Stop(), retry_seconds=0.1)
