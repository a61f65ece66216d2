"""Full lists: fill the store at the start, and repair it regularly after what a watch may have missed."""

from __future__ import annotations

from collections.abc import Callable

from tunewright_operator import kube
from tunewright_operator.constants import LABEL_ATTEMPT
from tunewright_operator.kinds import KINDS, Key
from tunewright_operator.kube import Kube
from tunewright_operator.store import Store, owner_key


async def resync(api: Kube, store: Store, namespaces: tuple[str, ...], add: Callable[[Key], None]) -> int:
    """List workloads, Jobs and pods, bring the store up to date, and hand unfinished keys to `add`.

    Returns:
        The number of workloads.
    """
    known = set(store.keys())
    known_jobs = {(key, name) for key in known for name in store.entry(key).jobs}
    found: set[Key] = set()
    jobs: set[tuple[Key, str]] = set()
    # Workloads first: pods of finished ones need not be kept.
    for namespace in namespaces or (None,):
        for kind in KINDS:
            async for raw in api.list(kube.workloads(kind), namespace):
                store.put_workload(kind, raw)
                found.add(Key(kind, raw["metadata"]["namespace"], raw["metadata"]["name"]))
        async for raw in api.list(kube.JOBS, namespace, LABEL_ATTEMPT):
            store.put_job(raw)
            key = owner_key(raw)
            if key is not None:
                jobs.add((key, raw["metadata"]["name"]))
        async for raw in api.list(kube.PODS, namespace, LABEL_ATTEMPT):
            store.put_pod(raw)
    for key in known - found:
        # Perhaps created after the list: the pass that follows reads it live and forgets it when it is gone.
        entry = store.entry(key)
        entry.text, entry.finished = None, False
        add(key)
    for key, name in known_jobs - jobs:
        store.entry(key).jobs.pop(name, None)
    for key in found:
        entry = store.entry(key)
        if not entry.finished or (entry.has_ttl and entry.jobs):
            add(key)
    return len(found)
