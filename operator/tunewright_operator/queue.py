"""The work queue: each key at most once in line and with at most one worker, retries with backoff."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from tunewright_operator import metrics

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

_FIRST_BACKOFF_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 300.0
_TURN_OF_OTHERS = 8


class WorkQueue(Generic[K]):
    """Calls a handler for keys that somebody added.

    A key that is added while it waits stays in line once; one that is added while its handler runs comes again
    afterwards. A handler that raises is called again after 1 s, doubling up to 5 min, with up to 10 % of jitter; what
    it returns is the number of seconds after which to call it again, None for never.
    """

    def __init__(
        self,
        handler: Callable[[K], Awaitable[float | None]],
        concurrency: int,
        *,
        clock: Callable[[], float],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Prepare a queue; `clock` gives monotonic seconds, `jitter` a number from 0 to 1."""
        self._handler = handler
        self._concurrency = concurrency
        self._clock = clock
        self._jitter = jitter
        self._line: dict[K, float] = {}
        """Keys that wait, in order, with the time they came."""
        self._urgent: dict[K, float] = {}
        """Keys that go first, likewise."""
        self._taken = 0
        self._running: dict[K, float] = {}
        self._again: set[K] = set()
        self._failures: dict[K, int] = {}
        self._due: dict[K, float] = {}
        """Keys with a timer; a heap entry with another time is out of date."""
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()
        self._wake_worker = asyncio.Event()
        self._wake_timer = asyncio.Event()

    def add(self, key: K, *, urgent: bool = False) -> None:
        """Put a key in line at once; a timer for it is dropped, because the handler will set a new one.

        Urgent keys go before the others, but every eighth turn is the others': neither kind can starve.
        """
        self._due.pop(key, None)
        if key in self._running:
            self._again.add(key)
            return
        if key in self._urgent or (key in self._line and not urgent):
            return
        line = self._urgent if urgent else self._line
        line[key] = self._line.pop(key, self._clock())
        self._wake_worker.set()
        metrics.QUEUE_DEPTH.set(self.depth)

    @property
    def depth(self) -> int:
        """Number of keys in line."""
        return len(self._line) + len(self._urgent)

    @property
    def has_urgent(self) -> bool:
        """Whether a key that goes first is in line."""
        return bool(self._urgent)

    def add_after(self, key: K, seconds: float) -> None:
        """Put a key in line after some seconds, unless it gets there earlier."""
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock() + seconds
        if self._due.get(key, due + 1) <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._order), key))
        self._wake_timer.set()

    def oldest_seconds(self) -> float:
        """Return how long the longest waiting or running key has been waiting or running."""
        times = [
            min(self._urgent.values(), default=None),
            next(iter(self._line.values()), None),
            min(self._running.values(), default=None),
        ]
        return max((self._clock() - time for time in times if time is not None), default=0.0)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_timers(), name="queue timers")
            for number in range(self._concurrency):
                group.create_task(self._run_worker(), name=f"queue worker {number}")

    async def work_off(self) -> None:
        """Handle all keys in line, one after the other, and return (for tests)."""
        self.release_due()
        while self.depth:
            await self._handle(self._take())

    def release_due(self) -> float | None:
        """Put keys whose timer ran out in line; return the seconds to the next timer."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) != due:
                heapq.heappop(self._heap)
                continue
            wait = due - self._clock()
            if wait > 0:
                return wait
            heapq.heappop(self._heap)
            self.add(key)
        return None

    async def _run_timers(self) -> None:
        while True:
            self._wake_timer.clear()
            wait = self.release_due()
            try:
                await asyncio.wait_for(self._wake_timer.wait(), wait)
            except TimeoutError:
                continue

    async def _run_worker(self) -> None:
        while True:
            while not self.depth:
                self._wake_worker.clear()
                await self._wake_worker.wait()
            await self._handle(self._take())

    def _take(self) -> K:
        self._taken += 1
        line = self._urgent
        if not line or (self._line and self._taken % _TURN_OF_OTHERS == 0):
            line = self._line
        key = next(iter(line))
        metrics.QUEUE_LATENCY.observe(self._clock() - line.pop(key))
        metrics.QUEUE_DEPTH.set(self.depth)
        self._running[key] = self._clock()
        return key

    async def _handle(self, key: K) -> None:
        started = self._clock()
        result = "error"
        try:
            again_after = await self._handler(key)
            result = "ok"
            self._failures.pop(key, None)
        # The queue is the one place where any error of a pass means the same: log it, and try again later.
        except Exception as error:
            again_after = self._backoff(key)
            metrics.QUEUE_RETRIES.inc()
            logger.warning(
                "pass failed",
                extra={"key": str(key), "error": repr(error), "retry_seconds": again_after},
                exc_info=True,
            )
        finally:
            del self._running[key]
            metrics.RECONCILES.labels(result).inc()
            metrics.RECONCILE_SECONDS.observe(self._clock() - started)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        elif again_after is not None:
            self.add_after(key, again_after)

    def _backoff(self, key: K) -> float:
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        seconds = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 16), _MAX_BACKOFF_SECONDS)
        return seconds * (1 + 0.1 * self._jitter())
