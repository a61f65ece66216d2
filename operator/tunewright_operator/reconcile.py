"""One pass over a FineTuneJob or AdapterMerge: read, decide, act, write the status once, tell of transitions."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tunewright_api.conditions import ConditionType, is_true
from tunewright_api.v1alpha1.status import RunStatus
from tunewright_api.validation import InvalidDocument
from tunewright_operator import metrics
from tunewright_operator.apply import Applier
from tunewright_operator.errors import Conflict, NotFound
from tunewright_operator.kinds import Key, Kind
from tunewright_operator.observe import Observer
from tunewright_operator.observed import ObservedRun, Refusal, parse_time
from tunewright_operator.post import EventPoster
from tunewright_operator.settings import Settings
from tunewright_operator.status import (
    CreateJob,
    Decision,
    DeleteJobs,
    current_attempt,
    decide,
    is_finished,
    refuse_spec,
    resolved,
    transition_events,
)
from tunewright_operator.store import Store


def utc_now() -> datetime.datetime:
    """Return the time; the default clock."""
    return datetime.datetime.now(datetime.UTC)


class Reconciler:
    """Brings a workload nearer to its end, one pass at a time."""

    def __init__(
        self,
        store: Store,
        observer: Observer,
        applier: Applier,
        poster: EventPoster,
        settings: Settings,
        hurried: Callable[[], bool],
        wake: Callable[[Key], None],
        clock: Callable[[], datetime.datetime] = utc_now,
    ) -> None:
        """Put the parts together.

        Args:
            store: What the watches have delivered.
            observer: Reads.
            applier: Writes.
            poster: Posts events.
            settings: The operator's.
            hurried: Tells whether workloads without a Job wait for a worker.
            wake: Puts a workload in line that waits for another one's result.
            clock: Gives the time.
        """
        self._store = store
        self._observer = observer
        self._applier = applier
        self._poster = poster
        self._settings = settings
        self._hurried = hurried
        self._wake = wake
        self._clock = clock

    async def reconcile(self, key: Key) -> float | None:
        """Make one pass; return the seconds after which to make another even when nothing happens.

        Raises:
            ApiError: The API server refused a request; the queue repeats the pass with backoff.
            ApiUnreachable: It gave no answer; likewise.
        """
        document = await self._observer.workload(key)
        if document is None or "deletionTimestamp" in document["metadata"]:
            return None
        metadata, now = document["metadata"], self._clock()
        previous = key.kind.status.model_validate(document.get("status", {}))
        seen = await self._observer.run(key, metadata["uid"], previous, now)
        try:
            workload = key.kind.parse({**document, "status": None})
        except InvalidDocument as error:
            problems = [str(problem) for problem in error.problems]
            decision = Decision(refuse_spec(previous, metadata["generation"], problems, now))
        else:
            if not is_finished(previous):
                seen = replace(seen, references=await self._observer.references(key, workload.spec, previous))
            decision = decide(workload, previous, seen, now, self._settings)
            match decision.action:
                case CreateJob() as action:
                    created = await self._applier.create_job(resolved(workload, decision.status), action)
                    if not isinstance(created, Refusal) and self._hurried():
                        # Others still wait for their Jobs: the status is written on a second turn, as after a crash.
                        return 0.0
                    seen = (
                        replace(seen, refusal=created) if isinstance(created, Refusal) else replace(seen, job=created)
                    )
                    decision = decide(workload, previous, seen, self._clock(), self._settings)
                case DeleteJobs() as action:
                    await self._applier.delete_jobs(key, action)
        return await self._finish(key, document, previous, seen, decision)

    async def _finish(
        self,
        key: Key,
        document: dict[str, Any],
        previous: RunStatus,
        seen: ObservedRun,
        decision: Decision,
    ) -> float | None:
        metadata, status = document["metadata"], decision.status
        try:
            written = await self._applier.write_status(key, document, status)
        except Conflict:
            # Somebody changed the workload meanwhile: decide again from what is there now.
            return 0.0
        except NotFound:
            self._store.forget(key)
            return None
        if written:
            _measure(key.kind, previous, status, seen)
            self._store.drop_pods_before(key, current_attempt(status))
            if status.phase != previous.phase:
                # The watch's echo of our own write is no news, so it wakes nobody.
                for waiting in self._store.awaited_by(key):
                    self._wake(waiting)
            for event in transition_events(previous, status):
                self._poster.add(key, metadata["uid"], event)
        return decision.requeue_seconds


def _measure(kind: Kind, old: RunStatus, new: RunStatus, seen: ObservedRun) -> None:
    started = is_true(new.conditions, ConditionType.PODS_READY) and not is_true(
        old.conditions, ConditionType.PODS_READY
    )
    starts = [parse_time(pod.started_at) for pod in seen.pods if pod.started_at is not None]
    if started and seen.job is not None and starts:
        waited = max(starts) - parse_time(seen.job.created)
        metrics.QUEUE_WAIT_SECONDS.labels(kind.name).observe(max(0.0, waited.total_seconds()))
    if is_finished(new) and not is_finished(old) and new.start_time and new.completion_time:
        took = parse_time(new.completion_time) - parse_time(new.start_time)
        metrics.RUN_DURATION_SECONDS.labels(kind.name, new.phase).observe(max(0.0, took.total_seconds()))
