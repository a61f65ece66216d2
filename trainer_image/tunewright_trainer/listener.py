"""What the workers say, and what their end means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tunewright_trainer import worker_process
from tunewright_trainer.errors import PeerLost, TrainerError
from tunewright_trainer.events import EventTail
from tunewright_trainer.protocol import ErrorEvent, Event, ResultEvent
from tunewright_trainer.run_log import RunLog
from tunewright_trainer.worker_process import GRACE_SECONDS, WorkerProcess

PEER_SECONDS = 15.0
"""After one worker has lost another: time for the launcher to end, which says whether the other one was of this pod."""


class Listener:
    """Reads the workers' events, passes them on, and notices how the workers end."""

    def __init__(
        self,
        worker: WorkerProcess,
        work: Path,
        log: RunLog,
        takers: Sequence[Callable[[Event], None]],
        *,
        expects_result: bool,
    ) -> None:
        """Begin to listen.

        Args:
            worker: The started process: a worker, or the launcher of several.
            work: Folder with the events.
            log: With the workers' output.
            takers: Called with every event.
            expects_result: The workers of this pod end with a result; those of further pods only end well.
        """
        self._worker = worker
        self._tail = EventTail(work)
        self._log = log
        self._takers = takers
        self._expects_result = expects_result
        self._oom_kills_before = worker_process.oom_kills()
        self.result: ResultEvent | None = None
        self.heard = False
        """Something was said."""
        self.ended_well = False
        """The workers of a further pod have done their part."""

    def listen(self) -> bool:
        """Take in what the workers said since the last time, and tell whether they said anything.

        Raises:
            WorkerFailure: One gave up.
            Killed, PeerLost, InternalError: One died.
        """
        # Before reading: what it said before its end must not be missed.
        code = self._worker.exit_code()
        events = self._tail.read()
        for event in events:
            self._take(event)
        if code == 0 and not self._expects_result:
            self.ended_well = True
        elif code is not None and self.result is None:
            raise self._death(code)
        self.heard = self.heard or bool(events)
        return bool(events)

    def _take(self, event: Event) -> None:
        for take in self._takers:
            take(event)
        if isinstance(event, ResultEvent):
            self.result = event
        elif isinstance(event, ErrorEvent):
            raise self._after_lost_peer(event) if event.reason == PeerLost.reason else worker_process.failure_of(event)

    def _after_lost_peer(self, event: ErrorEvent) -> TrainerError:
        """Return why a worker lost another one: the end of one of this pod says more than the loss of it."""
        code = self._worker.wait(PEER_SECONDS)
        for later in self._tail.read():
            if isinstance(later, ErrorEvent) and later.reason != PeerLost.reason:
                return worker_process.failure_of(later)
        death = self._death(code) if code is not None and code > 128 else None
        return death or worker_process.failure_of(event)

    def _death(self, code: int) -> TrainerError:
        self._worker.wait(GRACE_SECONDS)
        self._log.flush()
        return worker_process.death_of(
            code,
            self._log.last_worker_line(),
            oom_kills=worker_process.oom_kills() - self._oom_kills_before,
            memory_limit=worker_process.memory_limit(),
            lost_peer=worker_process.is_lost_peer(self._log.path),
        )
