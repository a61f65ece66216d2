"""kopf's part: its watches put keys into the queue, and do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import kopf
from kubernetes.aio import client

from tunewright_api import GROUP, VERSION
from tunewright_operator import metrics
from tunewright_operator.constants import LABEL_ATTEMPT
from tunewright_operator.kinds import KINDS, Key, Kind
from tunewright_operator.kube import bearer_token
from tunewright_operator.store import Store


def build_registry(
    store: Store, add: Callable[[Key], None], relisted: Callable[[], None], configuration: client.Configuration
) -> kopf.OperatorRegistry:
    """Return the handlers.

    Args:
        store: Takes over what the watches deliver.
        add: Puts a key into the queue.
        relisted: Called for each object of a list: after a gap, deletions may have been missed.
        configuration: The connection that kopf is to use as well.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection_info(configuration)

    def watch_workloads(kind: Kind) -> None:
        @kopf.on.event(GROUP, VERSION, kind.plural, id=kind.plural, registry=registry)
        async def on_workload(event: kopf.RawEvent, **_: Any) -> None:
            metrics.WATCH_EVENTS.labels(kind.plural).inc()
            raw: Any = event["object"]
            if event["type"] == "DELETED":
                # What it owns is the garbage collector's.
                _wake_waiting(store.drop_workload(kind, raw))
                return
            key = store.put_workload(kind, raw)
            _note(event, key)
            if key is not None:
                _wake_waiting(key)

    for kind in KINDS:
        watch_workloads(kind)

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def on_job(event: kopf.RawEvent, **_: Any) -> None:
        metrics.WATCH_EVENTS.labels("jobs").inc()
        raw: Any = event["object"]
        _note(event, store.put_job(raw, gone=event["type"] == "DELETED"))

    @kopf.on.event("", "v1", "pods", registry=registry)
    async def on_pod(event: kopf.RawEvent, **_: Any) -> None:
        metrics.WATCH_EVENTS.labels("pods").inc()
        raw: Any = event["object"]
        _note(event, store.put_pod(raw, gone=event["type"] == "DELETED"))

    def _wake_waiting(key: Key) -> None:
        for waiting in store.awaited_by(key):
            add(waiting)

    def _note(event: kopf.RawEvent, key: Key | None) -> None:
        if event["type"] is None:
            relisted()
        if key is not None:
            add(key)

    return registry


class _NoDiffBase(kopf.DiffBaseStorage):
    """Keeps nothing of an object.

    kopf prepares a comparison with an object's last state for every event, whether a handler wants one or not; with
    its own storage that means two deep copies of the object, three quarters of the time an event takes.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return cast(kopf.BodyEssence, {})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("no handler stores anything on an object")


def build_settings() -> kopf.OperatorSettings:
    """Return kopf's settings: watches only, nothing stored on objects, nothing posted."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = _NoDiffBase()
    # A stream that neither side closes in time is a dead one.
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.watching.connect_timeout = 30
    settings.networking.request_timeout = 30
    # Lists come in pages, and kopf forgets an object soon after its event: 5,000 raw objects would be 200 MB. Events of
    # one object come in bursts, for which one worker is enough.
    settings.watching.chunk_size = 100
    settings.queueing.idle_timeout = 0.2
    for resource in (("batch", "v1", "jobs"), ("", "v1", "pods")):
        settings.watching.label_selectors[resource] = LABEL_ATTEMPT
    return settings


async def connection_info(configuration: client.Configuration) -> kopf.ConnectionInfo:
    """Return the client's connection in kopf's terms; asked for again when a token has expired."""
    scheme, _, token = (await bearer_token(configuration) or "").partition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        proxy_url=configuration.proxy,
    )
