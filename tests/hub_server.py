"""A stand-in for the Hugging Face Hub: the part of its HTTP API that the real hub client uses here, in memory.

Repositories with branches and commits, files by Git LFS in one piece or in parts, tokens, and faults on demand. Xet,
the storage protocol of huggingface.co, is a binary protocol of its own and not spoken; with `hub.endpoint` set the
trainer makes the client use LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

PART_BYTES = 1000
"""Larger LFS files go up in parts of this size."""
LFS_SUFFIX = ".safetensors"
API_KINDS = {"models": "model", "datasets": "dataset"}
INVALID_TOKEN = "Invalid credentials in Authorization header"

Document = dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """One commit with all files at it."""

    oid: str
    title: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model or data set."""

    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    """Commits of each branch, the newest last."""

    def commit(self, branch: str, title: str, message: str, files: dict[str, bytes]) -> Commit:
        """Add a commit."""
        line = self.branches.setdefault(branch, [])
        content = json.dumps([title, message, branch, len(line), {n: _sha256(c) for n, c in sorted(files.items())}])
        line.append(Commit(hashlib.sha1(content.encode()).hexdigest(), title, message, files))  # noqa: S324 - as git
        return line[-1]

    def at(self, revision: str) -> Commit | None:
        """Return the commit that a revision means."""
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for line in self.branches.values() for commit in line)
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass(frozen=True)
class User:
    """Whom a token belongs to."""

    name: str
    organisations: tuple[str, ...] = ()
    writes: bool = True


@dataclass
class Fault:
    """Makes requests fail."""

    method: str
    part: str
    """Of the path."""
    status: int | None
    """None breaks the connection off amid the request."""
    times: int = 1
    after: bool = False
    """The request is carried out, and only its answer is bad."""


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        super().__init__(message)
        self.status = status
        self.document = {"error": message, **more}
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


class HubServer:
    """State and address of a running stand-in."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: dict[str, User] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        """Method and path of every request."""
        self.part_bytes = PART_BYTES
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Self]:
        """Serve until the block ends."""
        server = cls()
        thread = threading.Thread(target=server._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server._server.shutdown()
            server._server.server_close()

    def add(
        self, kind: str, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False
    ) -> Repository:
        """Add a repository with one commit."""
        repository = Repository(private=private, gated=gated)
        repository.commit("main", "initial commit", "", files)
        self.repositories[kind, name] = repository
        return repository

    def sent(self, text: str) -> list[str]:
        """Return the requests whose method and path have `text` in them."""
        return [request for request in self.requests if text in request]

    def take_fault(self, method: str, path: str, *, after: bool) -> Fault | None:
        """Return a fault that is due."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.part in path and fault.times > 0 and fault.after == after:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        return hub

    def do_HEAD(self) -> None:
        """Describe a file."""
        self._serve()

    def do_GET(self) -> None:
        """Answer a question."""
        self._serve()

    def do_POST(self) -> None:
        """Change something."""
        self._serve()

    def do_PUT(self) -> None:
        """Take a file or a part of one."""
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.take_fault(self.command, path, after=False)
        if fault is not None and fault.status is None:
            self._break_off()
            return
        body = self._body()
        if fault is not None:
            self._answer(fault.status or 0, {"error": "as asked for"})
            return
        try:
            with self.hub.lock:
                status, answer, headers = 200, *self._route(path, body)
        except Refused as refusal:
            status, answer, headers = refusal.status, refusal.document, refusal.headers
        fault = self.hub.take_fault(self.command, path, after=True)
        if fault is not None and fault.status is None:
            self._break_off()
            return
        self._answer(fault.status or 0 if fault is not None else status, answer, headers)

    def _break_off(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, path: str, body: bytes) -> tuple[Any, dict[str, str]]:
        if path.startswith("/lfs/"):
            return self._take_object(path.removeprefix("/lfs/"), body)
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body)), {}
        if "/resolve/" in path:
            return self._resolve(path)
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, {}
        if path == "/api/whoami-v2":
            return self._whoami(), {}
        if path == "/api/repos/create":
            return self._create(json.loads(body)), {}
        _, _, kind, organisation, name, *rest = path.split("/", 5)
        action, _, argument = (rest[0] if rest else "revision/main").partition("/")
        repository = self._repository(API_KINDS[kind], f"{organisation}/{name}")
        return self._about(repository, f"{organisation}/{name}", action, argument, body), {}

    def _user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, message=INVALID_TOKEN)
        return self.hub.tokens.get(token)

    def _may_write(self, name: str) -> None:
        user = self._user()
        if user is None or not user.writes or name.split("/")[0] not in (user.name, *user.organisations):
            raise Refused(403, message="you have no rights to write here")

    def _repository(self, kind: str, name: str) -> Repository:
        repository, user = self.hub.repositories.get((kind, name)), self._user()
        member = user is not None and name.split("/")[0] in (user.name, *user.organisations)
        if repository is None or (repository.private and not member):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if repository.gated and user is None:
            raise Refused(401, "GatedRepo", "Access is restricted")
        return repository

    def _whoami(self) -> Document:
        user = self._user()
        if user is None:
            raise Refused(401, message=INVALID_TOKEN)
        return {"type": "user", "name": user.name, "orgs": [{"name": name} for name in user.organisations]}

    def _create(self, wanted: Document) -> Document:
        name = f"{wanted['organization']}/{wanted['name']}"
        self._may_write(name)
        kind = wanted.get("type") or "model"
        if (kind, name) in self.hub.repositories:
            raise Refused(409, message="You already created this", url=f"{self.hub.endpoint}/{name}")
        self.hub.add(kind, name, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/{name}"}

    def _about(self, repository: Repository, name: str, action: str, argument: str, body: bytes) -> Any:
        if action == "auth-check":
            if argument == "write":
                self._may_write(name)
            return {}
        if action == "branch":
            self._may_write(name)
            if argument in repository.branches:
                raise Refused(409, message="Reference already exists")
            repository.branches[argument] = list(repository.branches["main"])
            return {}
        commit = repository.at(argument)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {argument}")
        match action:
            case "revision":
                siblings = [{"rfilename": n, "size": len(c), "blobId": _git(c)} for n, c in commit.files.items()]
                return {"id": name, "sha": commit.oid, "siblings": siblings, "private": repository.private, "tags": []}
            case "tree":
                return [{"type": "file", "path": n, "size": len(c), "oid": _git(c)} for n, c in commit.files.items()]
            case "commits":
                return [
                    {"id": c.oid, "title": c.title, "message": c.message, "authors": [], "date": "2026-01-01T00:00:00Z"}
                    for c in reversed(repository.branches[argument])
                ]
            case "preupload":
                self._may_write(name)
                return {"files": [_upload_mode(commit, file["path"]) for file in json.loads(body)["files"]]}
            case "commit":
                self._may_write(name)
                return self._commit(repository, name, argument, [json.loads(line) for line in body.splitlines()])
        raise Refused(404, message=f"no {action} here")

    def _commit(self, repository: Repository, name: str, branch: str, lines: list[Document]) -> Document:
        files = dict(repository.branches[branch][-1].files)
        header: Document = {}
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refused(400, message=f"LFS pointer {value['oid']} points to nothing")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = repository.commit(branch, header["summary"], header["description"], files)
        return {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit.oid}", "commitOid": commit.oid}

    def _batch(self, wanted: Document) -> Document:
        return {"transfer": "multipart", "objects": [self._upload_action(item) for item in wanted["objects"]]}

    def _upload_action(self, item: Document) -> Document:
        oid, size = item["oid"], item["size"]
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        url = f"{self.hub.endpoint}/lfs/{oid}"
        part_bytes = self.hub.part_bytes
        if size <= part_bytes:
            return {"oid": oid, "size": size, "actions": {"upload": {"href": url}}}
        self.hub.parts[oid] = {}
        count = -(-size // part_bytes)
        header = {"chunk_size": str(part_bytes), **{str(n): f"{url}/{n}" for n in range(1, count + 1)}}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{url}/complete", "header": header}}}

    def _take_object(self, place: str, body: bytes) -> tuple[Any, dict[str, str]]:
        oid, _, part = place.partition("/")
        if part == "complete":
            body = b"".join(self.hub.parts[oid][given["partNumber"]] for given in json.loads(body)["parts"])
        elif part:
            self.hub.parts[oid][int(part)] = body
            return {}, {"ETag": f'"{_sha256(body)}"'}
        if _sha256(body) != oid:
            raise Refused(400, message="the content does not match its SHA-256")
        self.hub.objects[oid] = body
        return {}, {}

    def _resolve(self, path: str) -> tuple[Any, dict[str, str]]:
        place, _, rest = path.strip("/").partition("/resolve/")
        kind = "dataset" if place.startswith("datasets/") else "model"
        repository = self._repository(kind, place.removeprefix("datasets/"))
        revision, _, name = rest.partition("/")
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        if name not in commit.files:
            raise Refused(404, "EntryNotFound")
        content = commit.files[name]
        return content, {"ETag": f'"{_git(content)}"', "X-Repo-Commit": commit.oid}

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def _upload_mode(commit: Commit, path: str) -> Document:
    lfs = path.endswith(LFS_SUFFIX)
    answer: Document = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
    if path in commit.files:
        answer["oid"] = _sha256(commit.files[path]) if lfs else _git(commit.files[path])
    return answer


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - as git
