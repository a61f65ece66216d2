"""A proxy that breaks S3 on purpose."""

from __future__ import annotations

import http.client
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.cluster.s3 import S3Server


@dataclass
class Proxy:
    """Stands in front of an S3 server and breaks requests: each one takes the next of `faults`, if there is any.

    `500`, `503`: answered so. `drop`: the connection is closed without an answer. `truncate`: half the body comes,
    then the connection closes. `flip`: one bit of the body is another. `pass`: goes through.
    """

    endpoint: str
    faults: deque[str] = field(default_factory=deque)
    always: str | None = None
    only: str = ""
    """Only requests whose line has this in it are broken."""
    requests: list[str] = field(default_factory=list)


@contextmanager
def proxied(server: S3Server, address: str = "127.0.0.1") -> Iterator[Proxy]:
    """Run a proxy in front of a server; `address`: where it listens."""
    upstream = server.endpoint.removeprefix("http://")
    proxy = Proxy("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.requests.append(f"{self.command} {self.path}")
            fault = "pass"
            if proxy.only in proxy.requests[-1]:
                fault = proxy.always or (proxy.faults.popleft() if proxy.faults else "pass")
            if fault == "drop":
                self.close_connection = True
            elif fault.isdigit():
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._relay(body, fault)

        def _relay(self, body: bytes, fault: str) -> None:
            connection = http.client.HTTPConnection(upstream, timeout=30)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if fault == "flip" and content:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)
            self.close_connection = fault == "truncate"

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815 - the names are http.server's

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    httpd = ThreadingHTTPServer((address, 0), Handler)
    httpd.daemon_threads = True
    proxy.endpoint = f"http://{address}:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        httpd.shutdown()
        httpd.server_close()
