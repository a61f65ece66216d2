"""What the watches have delivered, trimmed to what decisions need. No I/O, one event loop, no locks.

A workload is kept as JSON text, a tenth of the size of the dictionaries in it; of a finished one only its version
and phase are kept. Deciding from here is safe where a stale object leads only to a refused request (a Job is created
by its one name, a status is written against the version it was read in) or to another look; that something is *not*
there is always asked of the API server.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunewright_operator.kinds import KINDS, Key, Kind
from tunewright_operator.observed import ObservedJob, ObservedPod, parse_job, parse_pod

Raw = Mapping[str, Any]


@dataclass(slots=True)
class Entry:
    """All that is known of one workload."""

    version: int = 0
    """resourceVersion of the newest state seen or written."""
    text: str | None = None
    """The workload as JSON; None when it must be read live, or is finished."""
    phase: str = ""
    finished: bool = False
    has_ttl: bool = False
    jobs: dict[str, ObservedJob] = field(default_factory=dict)
    pods: dict[str, ObservedPod] = field(default_factory=dict)
    progress_written: float = float("-inf")
    """Monotonic time of the last progress write."""
    awaited: tuple[int, float] | None = None
    """Version that we wrote and the watch has not shown yet, and when."""

    @property
    def is_new(self) -> bool:
        """Whether nothing has been done for it yet."""
        return not self.finished and not self.phase and not self.jobs


class Store:
    """Entries by key."""

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}
        self._awaited_by: dict[Key, set[Key]] = {}
        """Workloads that need the result of a key, which may not exist yet."""
        self._waits_for: dict[Key, tuple[Key, ...]] = {}
        """The same the other way round."""

    def entry(self, key: Key) -> Entry:
        """Return the entry of a key, made when missing."""
        return self._entries.setdefault(key, Entry())

    def find(self, key: Key) -> Entry | None:
        """Return the entry of a key, or None."""
        return self._entries.get(key)

    def forget(self, key: Key) -> None:
        """Drop all that is known of a workload."""
        self._entries.pop(key, None)
        self.wait_for(key, ())

    def keys(self) -> Iterator[Key]:
        """Return all keys."""
        return iter(list(self._entries))

    def put_workload(self, kind: Kind, raw: Raw, *, written: bool = False) -> Key | None:
        """Take over a FineTuneJob or AdapterMerge; return its key when it is news.

        Args:
            kind: Which of them it is.
            raw: The object.
            written: It is the answer to our own write: the watch will show it again, which is then no news.
        """
        metadata = raw["metadata"]
        key = Key(kind, metadata["namespace"], metadata["name"])
        entry = self.entry(key)
        version = int(metadata["resourceVersion"])
        if entry.awaited is not None and version >= entry.awaited[0]:
            entry.awaited = None
        if version <= entry.version:
            return None
        status = raw.get("status", {})
        entry.version = version
        entry.phase = status.get("phase", "")
        entry.finished = status.get("completionTime") is not None
        entry.has_ttl = "ttlAfterFinished" in raw["spec"]
        if written:
            entry.awaited = (version, time.monotonic())
        if entry.finished:
            entry.text = None
            entry.pods.clear()
            self.wait_for(key, ())
        else:
            entry.text = json.dumps(_trimmed(raw), separators=(",", ":"))
        return key

    def drop_workload(self, kind: Kind, raw: Raw) -> Key:
        """Forget a deleted workload and return its key."""
        key = Key(kind, raw["metadata"]["namespace"], raw["metadata"]["name"])
        self.forget(key)
        return key

    def put_job(self, raw: Raw, *, gone: bool = False) -> Key | None:
        """Take over a Job, or its removal; return the key when it is news."""
        key = owner_key(raw)
        if key is None:
            return None
        if gone:
            known = self._entries.get(key)
            return key if known is not None and known.jobs.pop(raw["metadata"]["name"], None) is not None else None
        job, jobs = parse_job(raw), self.entry(key).jobs
        if jobs.get(job.name) == job:
            return None
        jobs[job.name] = job
        return key

    def put_pod(self, raw: Raw, *, gone: bool = False) -> Key | None:
        """Take over a pod, or its removal; return the key when it is news. Pods of finished runs are nobody's news."""
        key = owner_key(raw)
        if key is None:
            return None
        entry = self._entries.get(key) if gone else self.entry(key)
        if entry is None or entry.finished:
            return None
        pod = parse_pod(raw, gone=gone)
        known = entry.pods.get(pod.name)
        entry.pods[pod.name] = pod
        # A new pod that waits for the scheduler is what a Job is created for: nothing follows from it.
        return None if pod == known or (known is None and pod.fresh) else key

    def drop_pods_before(self, key: Key, attempt: int) -> None:
        """Forget pods of attempts whose end is on record."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.pods = {name: pod for name, pod in entry.pods.items() if pod.attempt >= attempt}

    def wait_for(self, key: Key, others: Iterable[Key]) -> None:
        """Note whose results a workload waits for, in place of what was noted before."""
        for other in self._waits_for.pop(key, ()):
            self._awaited_by[other].discard(key)
            if not self._awaited_by[other]:
                del self._awaited_by[other]
        wanted = tuple(others)
        if wanted:
            self._waits_for[key] = wanted
        for other in wanted:
            self._awaited_by.setdefault(other, set()).add(key)

    def awaited_by(self, key: Key) -> tuple[Key, ...]:
        """Return the workloads that wait for the result of a key."""
        return tuple(sorted(self._awaited_by.get(key, ()), key=str))

    def circle(self, key: Key) -> tuple[Key, ...]:
        """Return the way from a workload along what each one waits for back to itself; empty where there is none."""
        visited: set[Key] = set()
        line: list[tuple[Key, ...]] = [(key,)]
        while line:
            way = line.pop()
            for other in self._waits_for.get(way[-1], ()):
                if other == key:
                    return (*way, key)
                if other not in visited:
                    visited.add(other)
                    line.append((*way, other))
        return ()

    def phases(self, kind: Kind) -> Counter[tuple[str, str]]:
        """Count the workloads of a kind by namespace and phase."""
        return Counter(
            (key.namespace, entry.phase or "Pending") for key, entry in self._entries.items() if key.kind is kind
        )

    def longest_awaited(self) -> float:
        """Return for how many seconds the watch has owed us the echo of a write of our own."""
        now = time.monotonic()
        return max((now - e.awaited[1] for e in self._entries.values() if e.awaited is not None), default=0.0)


def owner_key(raw: Raw) -> Key | None:
    """Return the workload that a Job or pod says it belongs to."""
    metadata = raw["metadata"]
    labels = metadata.get("labels", {})
    return next(
        (Key(kind, metadata["namespace"], labels[kind.label]) for kind in KINDS if labels.get(kind.label)), None
    )


_KEPT = ("name", "namespace", "uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp")


def _trimmed(raw: Raw) -> dict[str, Any]:
    metadata = {key: raw["metadata"][key] for key in _KEPT if key in raw["metadata"]}
    return {
        "apiVersion": raw["apiVersion"],
        "kind": raw["kind"],
        "metadata": metadata,
        "spec": raw["spec"],
        "status": raw.get("status", {}),
    }
