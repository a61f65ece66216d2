"""The operator process: everything is put together here, and ends here."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import time
from importlib.metadata import version

import kopf
import uvloop

from tunewright_operator import log, metrics
from tunewright_operator.apply import Applier
from tunewright_operator.errors import OperatorError
from tunewright_operator.handlers import build_registry, build_settings
from tunewright_operator.health import NO_OP, Health, serve
from tunewright_operator.kinds import Key
from tunewright_operator.kube import Kube, load_configuration
from tunewright_operator.observe import Observer
from tunewright_operator.post import EventPoster
from tunewright_operator.queue import WorkQueue
from tunewright_operator.reconcile import Reconciler
from tunewright_operator.resync import resync
from tunewright_operator.settings import Settings
from tunewright_operator.store import Store

logger = logging.getLogger(__name__)

_TICK_SECONDS = 30.0
_FLUSH_SECONDS = 3.0
_SETTLED_SECONDS = 60.0
"""kopf's own first lists, which come right after ours, tell nothing of a gap."""


class Operator:
    """All parts of a running operator."""

    def __init__(self, settings: Settings, api: Kube) -> None:
        """Put the parts together; nothing runs yet. Needs a running event loop."""
        self.settings = settings
        self.api = api
        self.store = Store()
        self.observer = Observer(api, self.store, settings)
        self.poster = EventPoster(api, lambda: self.queue.depth > 0)
        applier = Applier(api, self.store, settings)
        self.queue: WorkQueue[Key] = WorkQueue(self._handle, settings.concurrency, clock=time.monotonic)
        self.reconciler = Reconciler(
            self.store, self.observer, applier, self.poster, settings, lambda: self.queue.has_urgent, self.add
        )
        self.health = Health(self.queue, self.store, api)
        self._started = time.monotonic()
        self._gap = False
        self.listed = asyncio.Event()

    async def _handle(self, key: Key) -> float | None:
        if key == NO_OP:
            self.health.beat()
            return None
        return await self.reconciler.reconcile(key)

    def add(self, key: Key) -> None:
        """Put a key in line; workloads that have no Job yet go first: users wait for GPUs, not for statuses."""
        entry = self.store.find(key)
        self.queue.add(key, urgent=entry is not None and entry.is_new)

    def relisted(self) -> None:
        """Note that a watch has listed anew: what was deleted in between was not told."""
        if time.monotonic() - self._started > _SETTLED_SECONDS:
            self._gap = True

    async def keep_in_sync(self) -> None:
        """List everything now and then; before the first time, the queue does not work."""
        while True:
            self._gap = False
            began = time.monotonic()
            count = await resync(self.api, self.store, self.settings.watch_namespaces, self.add)
            self.health.ready = True
            self.listed.set()
            logger.info("listed", extra={"workloads": count, "seconds": round(time.monotonic() - began, 3)})
            # A tenth of jitter, so that several operators on one API server do not list in step.
            until = time.monotonic() + self.settings.resync_seconds * random.uniform(0.9, 1.1)  # noqa: S311
            while time.monotonic() < until and not self._gap:
                self.queue.add(NO_OP)
                await asyncio.sleep(min(_TICK_SECONDS, self.settings.resync_seconds))

    async def watch(self, stop: asyncio.Event) -> None:
        """Run kopf until a signal or `stop`.

        Raises:
            Exception: A watch got an answer that nobody can go on from; the process ends and is started anew.
        """
        await kopf.operator(
            registry=build_registry(self.store, self.add, self.relisted, self.api.configuration),
            settings=build_settings(),
            standalone=True,
            # Nobody reads it without peering; left to kopf, it asks for the user's name, which a container has not.
            identity="tunewright",  # type: ignore[arg-type]  # a NewType that kopf does not export
            clusterwide=not self.settings.watch_namespaces,
            namespaces=self.settings.watch_namespaces,
            stop_flag=stop,
        )


async def run(settings: Settings, stop: asyncio.Event | None = None) -> None:
    """Run an operator until SIGTERM, SIGINT or `stop`.

    Raises:
        OperatorError: There is no cluster, or the first list failed.
        OSError: The port of health and metrics is taken.
    """
    stop = stop or asyncio.Event()
    metrics.BUILD_INFO.labels(version("tunewright")).set(1)
    async with Kube(await load_configuration(), settings.concurrency) as api:
        operator = Operator(settings, api)
        server = await serve(operator.health, operator.store, settings.port)
        try:
            await _run_parts(operator, stop)
        finally:
            await server.cleanup()
            await operator.observer.close()


async def _run_parts(operator: Operator, stop: asyncio.Event) -> None:
    """Run all tasks until kopf ends or one of them fails."""
    parts = [
        asyncio.create_task(operator.keep_in_sync(), name="resync"),
        asyncio.create_task(_when_ready(operator), name="queue"),
        asyncio.create_task(operator.poster.run(), name="events"),
    ]
    # kopf cancels all tasks that start after it has, so ours start first.
    watch = asyncio.create_task(operator.watch(stop), name="kopf")
    try:
        done, _ = await asyncio.wait([watch, *parts], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        stop.set()
        await operator.poster.flush(_FLUSH_SECONDS)
        for task in parts:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(watch, *parts, return_exceptions=True)


async def _when_ready(operator: Operator) -> None:
    """Work once the first list is done: until then, "not seen" means nothing."""
    await operator.listed.wait()
    await operator.queue.run()


def main() -> int:
    """Run the operator; return the exit code."""
    settings = Settings()
    log.set_up(settings.log_level)
    logger.info("start", extra={"version": version("tunewright")})
    # What is imported by now stays: the garbage collector need not look at it again. And a JSON document is thousands
    # of objects, none of them garbage that only the collector finds: at every 700 objects it would run for each one.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        uvloop.run(run(settings))
    except OperatorError as error:
        logger.error("the operator cannot run", extra={"error": str(error)})  # noqa: TRY400  the message says it all
        return 1
    logger.info("end")
    return 0
