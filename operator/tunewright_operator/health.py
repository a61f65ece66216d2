"""Liveness, readiness and metrics over HTTP. Liveness proves that events are handled, not only that the loop turns."""

from __future__ import annotations

import time

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tunewright_operator import metrics
from tunewright_operator.kinds import FINETUNEJOB, KINDS, Key
from tunewright_operator.kube import Kube
from tunewright_operator.queue import WorkQueue
from tunewright_operator.store import Store

_QUEUE_LIMIT_SECONDS = 300.0
"""A pass ends within a few request limits of 30 s, and 5,000 keys at once are worked off in a minute."""
_ECHO_LIMIT_SECONDS = 180.0
"""A watch that has died is opened again after 70 s at most, and then shows what it owes."""
_BEAT_LIMIT_SECONDS = 180.0
"""The no-op goes through the queue every 30 s."""
_ANSWER_LIMIT_SECONDS = 1800.0
"""Long: a restart does not bring an absent API server back, but it does bring new credentials."""

NO_OP = Key(FINETUNEJOB, "", "")
"""A key of no workload: handling it shows that workers take keys."""


class Health:
    """What the probes ask for."""

    def __init__(self, queue: WorkQueue[Key], store: Store, api: Kube) -> None:
        self._queue = queue
        self._store = store
        self._api = api
        self._last_beat = time.monotonic()
        self.ready = False
        """Set once the first full list is done."""

    def beat(self) -> None:
        """Note that a worker has handled the no-op."""
        self._last_beat = time.monotonic()

    def problems(self) -> list[str]:
        """Return what is wrong, in words; empty when all is well."""
        now = time.monotonic()
        checks = (
            ("the oldest key in the queue has waited", self._queue.oldest_seconds(), _QUEUE_LIMIT_SECONDS),
            ("the watch owes the echo of a write for", self._store.longest_awaited(), _ECHO_LIMIT_SECONDS),
            ("no worker has taken a key for", now - self._last_beat if self.ready else 0.0, _BEAT_LIMIT_SECONDS),
            ("the API server has not answered for", now - self._api.last_answer, _ANSWER_LIMIT_SECONDS),
        )
        return [f"{what} {seconds:.0f} s (limit {limit:.0f} s)" for what, seconds, limit in checks if seconds > limit]


async def serve(health: Health, store: Store, port: int) -> web.AppRunner:
    """Start the server on all addresses; the caller cleans it up.

    Raises:
        OSError: The port is taken.
    """

    async def healthz(_: web.Request) -> web.Response:
        problems = health.problems()
        return web.Response(status=503 if problems else 200, text="\n".join(problems) or "ok")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok") if health.ready else web.Response(status=503, text="the first list is not done")

    async def exposition(_: web.Request) -> web.Response:
        metrics.WORKLOADS.clear()
        for kind in KINDS:
            for (namespace, phase), count in store.phases(kind).items():
                metrics.WORKLOADS.labels(kind.name, namespace, phase).set(count)
        return web.Response(body=generate_latest(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application()
    application.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", exposition)])
    runner = web.AppRunner(application, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
