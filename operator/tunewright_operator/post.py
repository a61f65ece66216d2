"""Kubernetes events, posted in the background: telling of the work never holds the work up."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from tunewright_api import API_VERSION
from tunewright_operator import kube, metrics
from tunewright_operator.constants import OPERATOR_NAME
from tunewright_operator.errors import ApiError, ApiUnreachable
from tunewright_operator.kinds import Key
from tunewright_operator.kube import Kube
from tunewright_operator.status import TransitionEvent

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 1024
"""The API server refuses longer event messages."""
_MAX_DELAY_SECONDS = 15.0
"""How long an event waits for the end of a burst of work."""
_LOOK_SECONDS = 0.1
_MAX_WAITING = 10_000
"""Events in line; more than that are dropped, since nobody reads them at that rate."""


class EventPoster:
    """Logs transitions at once and posts them one by one, so that a burst of work goes first.

    An event is a courtesy: when the API server does not want it, or the process ends, the log line and the status must
    do. Each is tried once.
    """

    def __init__(self, api: Kube, busy: Callable[[], bool]) -> None:
        """Prepare; `busy` tells whether there is work that an event would compete with."""
        self._api = api
        self._busy = busy
        self._instance = os.environ.get("HOSTNAME", OPERATOR_NAME)
        self._line: asyncio.Queue[tuple[float, Key, dict[str, Any]]] = asyncio.Queue(_MAX_WAITING)

    def add(self, key: Key, uid: str, event: TransitionEvent) -> None:
        """Tell of a transition of the workload with this UID."""
        metrics.TRANSITIONS.labels(event.reason).inc()
        logger.info(event.message, extra={**key.log_field, "reason": event.reason, "type": event.type})
        try:
            self._line.put_nowait((time.monotonic(), key, _event(key, uid, event, self._instance)))
        except asyncio.QueueFull:
            logger.warning("event dropped: too many wait", extra=key.log_field)

    async def run(self) -> None:
        """Post until cancelled."""
        while True:
            added, key, document = await self._line.get()
            await self._quiet(added + _MAX_DELAY_SECONDS)
            try:
                await self._api.post(kube.EVENTS, key.namespace, document)
            except (ApiError, ApiUnreachable) as error:
                logger.warning("event not posted", extra={**key.log_field, "error": str(error)})
            finally:
                self._line.task_done()

    async def _quiet(self, deadline: float) -> None:
        """Return when there is no work in line, or the deadline is over."""
        for _ in range(int(_MAX_DELAY_SECONDS / _LOOK_SECONDS)):
            if not self._busy() or time.monotonic() >= deadline:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def flush(self, limit_seconds: float) -> None:
        """Wait until all events are posted, or the limit is over; `run` must be at work."""
        try:
            async with asyncio.timeout(limit_seconds):
                await self._line.join()
        except TimeoutError:
            logger.warning("events lost at the end", extra={"count": self._line.qsize()})


def _event(key: Key, uid: str, event: TransitionEvent, instance: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": key.namespace, "generateName": f"{key.name}."},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": key.kind.name,
            "namespace": key.namespace,
            "name": key.name,
            "uid": uid,
        },
        "type": event.type,
        "reason": event.reason,
        "action": event.action,
        "message": event.message[:_MAX_MESSAGE],
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingComponent": OPERATOR_NAME,
        "reportingInstance": instance,
        "source": {"component": OPERATOR_NAME},
    }
