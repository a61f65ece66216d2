"""A stand-in for a W&B server: as much of its API as `wandb sync` needs to send one run, in memory."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class WandbServer:
    """What arrived at a running stand-in."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        """History of the run."""
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.run: dict[str, Any] = {}
        """What the run was registered with: name, project, entity, displayName."""
        self.exit_code: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.wandb = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

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

    def take(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""
        if path.endswith("/file_stream"):
            files = body.get("files", {})
            self.rows += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", ())]
            for line in files.get("wandb-summary.json", {}).get("content", ()):
                self.summary = json.loads(line)
            if body.get("complete"):
                self.exit_code = body["exitcode"]
            return {}
        if "upsertBucket" not in body["query"]:
            return {"data": {"serverInfo": {"features": []}}}
        given = {name: value for name, value in body["variables"].items() if value is not None}
        self.run |= given
        self.config = json.loads(given.get("config", "{}"))
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": given["entity"]}}
        bucket = {"id": "r", "name": given["name"], "displayName": given.get("displayName"), "project": project}
        return {"data": {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take a call."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        server: WandbServer = self.server.wandb  # type: ignore[attr-defined]
        answer = json.dumps(server.take(self.path, json.loads(body))).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""
