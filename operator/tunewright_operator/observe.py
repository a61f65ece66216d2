"""Reads: the cluster as one run shows it, and its pod's progress."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable
from typing import Any

import aiohttp
from pydantic import ValidationError

from tunewright_api.references import referred_jobs, referred_merge
from tunewright_api.run_report import MAX_PROGRESS_BYTES, Progress
from tunewright_api.v1alpha1.status import RunStatus
from tunewright_operator import kube, metrics, naming
from tunewright_operator.constants import PROGRESS_PORT
from tunewright_operator.errors import NotFound
from tunewright_operator.kinds import ADAPTERMERGE, FINETUNEJOB, Key, Spec
from tunewright_operator.kube import Kube
from tunewright_operator.observed import (
    ObservedJob,
    ObservedPod,
    ObservedReference,
    ObservedRun,
    parse_job,
    parse_pod,
    parse_time,
)
from tunewright_operator.settings import Settings
from tunewright_operator.status import current_attempt, is_finished
from tunewright_operator.store import Entry, Store

_PULL_LIMIT = aiohttp.ClientTimeout(total=2)


class Observer:
    """Reads from the watches' store where that is safe (see `store`), else from the API server."""

    def __init__(self, api: Kube, store: Store, settings: Settings) -> None:
        """Prepare; the session for progress is opened by `async with`."""
        self._api = api
        self._store = store
        self._settings = settings
        # A connector of its own: many slow pods must not use up the API server's connections.
        self._session = aiohttp.ClientSession(timeout=_PULL_LIMIT, trust_env=False, auto_decompress=False)

    async def close(self) -> None:
        """Close the session for progress."""
        await self._session.close()

    async def workload(self, key: Key) -> dict[str, Any] | None:
        """Return a FineTuneJob or AdapterMerge, None when it is gone or wants nothing."""
        entry = self._store.entry(key)
        if entry.finished and not (entry.has_ttl and entry.jobs):
            return None
        if entry.text is not None:
            document: dict[str, Any] = json.loads(entry.text)
            return document
        try:
            return await self._api.get(kube.workloads(key.kind), key.namespace, key.name)
        except NotFound:
            self._store.forget(key)
            return None

    async def run(self, key: Key, uid: str, status: RunStatus, now: datetime.datetime) -> ObservedRun:
        """Return what the cluster shows of the current attempt."""
        entry = self._store.entry(key)
        jobs = tuple(sorted(job.name for job in entry.jobs.values() if job.owner_uid == uid))
        if is_finished(status):
            return ObservedRun(jobs=jobs)
        attempt = current_attempt(status)
        name = naming.job_name(key.kind, key.name, attempt)
        job = entry.jobs.get(name)
        if job is not None and job.owner_uid != uid:
            job = None
        gone = False
        if job is None and status.job_ref is not None and status.job_ref.name == name:
            job = await self._job(key, name, uid)
            gone = job is None
        if job is None:
            waiting = status.next_attempt_time is not None and parse_time(status.next_attempt_time) > now
            earlier = await self._earlier_pods(key, now) if attempt > 1 and not gone and not waiting else ()
            return ObservedRun(job_gone=gone, earlier_pods=earlier, jobs=jobs)
        pods = await self._pods(key, entry, job)
        first = pods.pop(0, None)
        followers = tuple(pods[index] for index in sorted(pods))
        # The first one speaks for all, once all are there.
        complete = len(followers) == job.completions - 1 and all(pod.ready for pod in followers)
        progress = await self._progress(entry, first) if complete else None
        return ObservedRun(job=job, pod=first, followers=followers, jobs=jobs, progress=progress)

    async def references(self, key: Key, spec: Spec, status: RunStatus) -> tuple[ObservedReference, ...]:
        """Return the workloads whose results are needed and not known yet. Only a finished one costs a request."""
        known = {(reference.kind, reference.name) for reference in status.references or ()}
        needed = [Key(FINETUNEJOB, key.namespace, name) for name in referred_jobs(spec)]
        merge = referred_merge(spec)
        if merge is not None:
            needed.append(Key(ADAPTERMERGE, key.namespace, merge))
        others = [other for other in needed if (other.kind.name, other.name) not in known]
        # Noted before the first look: what happens after it brings the key back.
        self._store.wait_for(key, others)
        found = [await self._reference(other) for other in others]
        self._store.wait_for(
            key, [other for other, seen in zip(others, found, strict=True) if seen.state in ("Missing", "Unfinished")]
        )
        circle = self._store.circle(key)
        if circle:
            way = " -> ".join(other.short for other in circle)
            return (ObservedReference(circle[1].kind, circle[1].name, "Circular", way),)
        return tuple(found)

    async def _reference(self, other: Key) -> ObservedReference:
        entry = self._store.find(other)
        if entry is None or entry.version == 0:
            # Not asked of the API server: all that follows is another look, at the latest when it is created.
            return ObservedReference(other.kind, other.name, "Missing")
        if not entry.finished:
            return ObservedReference(other.kind, other.name, "Unfinished", entry.phase or "Pending")
        try:
            document = await self._api.get(kube.workloads(other.kind), other.namespace, other.name)
        except NotFound:
            return ObservedReference(other.kind, other.name, "Missing")
        status = other.kind.status.model_validate(document.get("status", {}))
        if other.kind is ADAPTERMERGE and document.get("spec", {}).get("output", {}).get("adapterOnly"):
            return ObservedReference(other.kind, other.name, "NoModel")
        if status.output is not None:
            found = status.output
            return ObservedReference(other.kind, other.name, "Complete", manifest_uri=found.manifest_uri, uri=found.uri)
        if status.failure is not None:
            return ObservedReference(
                other.kind, other.name, "Failed", f"{status.failure.reason}: {status.failure.message}"
            )
        # Created anew under the same name since; its event is on the way.
        return ObservedReference(other.kind, other.name, "Unfinished", status.phase or "Pending")

    async def _job(self, key: Key, name: str, uid: str) -> ObservedJob | None:
        """Read a Job live; None when it is not there or not owned by `uid`."""
        try:
            raw = await self._api.get(kube.JOBS, key.namespace, name)
        except NotFound:
            return None
        self._store.put_job(raw)
        job = parse_job(raw)
        return job if job.owner_uid == uid else None

    async def _pods(self, key: Key, entry: Entry, job: ObservedJob) -> dict[int, ObservedPod]:
        """Return the Job's newest pods by node; of a Job that has ended, only such as have ended too."""
        found = _newest(entry.pods.values(), job)
        if job.finished is None or (len(found) == job.completions and all(pod.terminal for pod in found.values())):
            return found
        # The two watches run side by side: the Job's end may come before its pod's.
        # What is running in the store but not in the list is gone, and its last words with it.
        pods = [pod for pod in entry.pods.values() if pod.terminal]
        async for raw in self._api.list(kube.PODS, key.namespace, f"{key.kind.label}={key.name}"):
            pods.append(parse_pod(raw))
        return _newest(pods, job)

    async def _earlier_pods(self, key: Key, now: datetime.datetime) -> tuple[str, ...]:
        """Return pods of earlier attempts that may still run, by a live list."""
        names = []
        async for raw in self._api.list(kube.PODS, key.namespace, f"{key.kind.label}={key.name}"):
            pod = parse_pod(raw)
            if not pod.terminal and not self._is_lost(pod, now):
                names.append(pod.name)
        return tuple(sorted(names))

    def _is_lost(self, pod: ObservedPod, now: datetime.datetime) -> bool:
        grace = datetime.timedelta(seconds=self._settings.node_lost_grace_seconds)
        return pod.deletion_time is not None and parse_time(pod.deletion_time) + grace <= now

    async def _progress(self, entry: Entry, pod: ObservedPod | None) -> Progress | None:
        """Return a running pod's progress when a write of it is due."""
        if pod is None or not pod.running or pod.ip is None or pod.deletion_time is not None:
            return None
        now = time.monotonic()
        if now - entry.progress_written < self._settings.progress_interval_seconds:
            return None
        progress = await self._pull(pod.ip)
        if progress is not None:
            entry.progress_written = now
        return progress

    async def _pull(self, ip: str) -> Progress | None:
        """Ask a pod for its progress. It runs an image that may be anybody's: limits on time, size, shape, place."""
        host = f"[{ip}]" if ":" in ip else ip
        try:
            async with self._session.get(f"http://{host}:{PROGRESS_PORT}/progress", allow_redirects=False) as response:
                body = await _bounded(response)
            progress = Progress.model_validate_json(body) if response.status == 200 and body is not None else None
        except (aiohttp.ClientError, TimeoutError, ValidationError):
            progress = None
        metrics.PROGRESS_PULLS.labels("error" if progress is None else "ok").inc()
        return progress


async def _bounded(response: aiohttp.ClientResponse) -> bytes | None:
    """Read a body of at most `MAX_PROGRESS_BYTES`; None when there is more."""
    chunks = bytearray()
    async for chunk in response.content.iter_chunked(16384):
        chunks += chunk
        if len(chunks) > MAX_PROGRESS_BYTES:
            return None
    return bytes(chunks)


def _newest(pods: Iterable[ObservedPod], job: ObservedJob) -> dict[int, ObservedPod]:
    """Return the newest pod of each node of a Job; the numbers of a Job with one pod are not looked at."""
    own = sorted((pod for pod in pods if pod.job_uid == job.uid), key=lambda pod: (pod.created, pod.name))
    return {pod.index if job.completions > 1 else 0: pod for pod in own}
