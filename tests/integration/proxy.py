"""A proxy between operator and API server: records every request, and can refuse one or act at it."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web

_VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}


@dataclass(frozen=True)
class Request:
    """A request as RBAC sees it."""

    group: str
    resource: str
    """With its subresource: `finetunejobs/status`."""
    verb: str
    namespace: str
    name: str


class Proxy:
    """Serves plain HTTP on a free port of the loopback address, from a thread of its own."""

    def __init__(self, server: str, tls: ssl.SSLContext) -> None:
        self._server = server
        self._tls = tls
        self.requests: list[Request] = []
        self.refuse: Callable[[Request], int | None] = lambda _: None
        """Returns a status to answer with instead of asking the API server. Called in the proxy's thread."""
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start serving."""
        self._thread.start()
        assert self._started.wait(10)

    @property
    def address(self) -> str:
        """The address to put into a kubeconfig."""
        return f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def count(self) -> Counter[tuple[str, str, str]]:
        """Count requests by (group, resource, verb)."""
        return Counter((r.group, r.resource, r.verb) for r in list(self.requests))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        application = web.Application(client_max_size=2**22)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as self._session:
            self._started.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        described = describe(request.method, request.path, "watch" in request.query)
        if described is not None:
            self.requests.append(described)
            status = self.refuse(described)
            if status is not None:
                body = {"kind": "Status", "status": "Failure", "reason": "Refused", "message": "refused by the test"}
                return web.json_response(body | {"code": status}, status=status)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        async with self._session.request(
            request.method,
            f"{self._server}{request.path_qs}",
            headers=headers,
            # An empty body would be given a content type, which the API server refuses for a GET.
            data=await request.read() or None,
            ssl=self._tls,
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() in ("content-type", "content-encoding")}
            response = web.StreamResponse(status=answer.status, headers=kept)
            try:
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
            except (ConnectionResetError, aiohttp.ClientConnectionError):
                # The operator was killed in the middle.
                pass
            return response


def describe(method: str, path: str, watching: bool) -> Request | None:
    """Return what a request asks for; None for paths that are no resources (discovery)."""
    parts = path.strip("/").split("/")
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[3:])
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    if not rest:
        return None
    resource = "/".join([rest[0], *rest[2:]])
    verb = _VERBS[method]
    if verb == "get" and len(rest) == 1:
        verb = "watch" if watching else "list"
    return Request(group, resource, verb, namespace, rest[1] if len(rest) > 1 else "")
