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

SIGNALS_FROM = 128
"""Exit codes above it are signals."""
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
            for take in self._takers:
                take(event)
            if isinstance(event, ResultEvent):
                self.result = event
        errors = errors_of(events)
        if errors:
            raise self._cause(errors)
        if code == 0 and not self._expects_result:
            self.ended_well = True
        elif code is not None and self.result is None:
            raise self._death(code)
        self.heard = self.heard or bool(events)
        return bool(events)

    def _cause(self, errors: list[ErrorEvent]) -> TrainerError:
        """Return why the workers gave up; where one lost another one of this pod, the end of that one says more."""
        cause = cause_among(errors)
        if cause is None:
            code = self._worker.wait(PEER_SECONDS)
            cause = cause_among(errors_of(self._tail.read()))
            if cause is None and code is not None and (code < 0 or code > SIGNALS_FROM):
                return self._death(code)
        return worker_process.failure_of(cause or errors[0])

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


def errors_of(events: Sequence[Event]) -> list[ErrorEvent]:
    """Return the events by which workers gave up."""
    return [event for event in events if isinstance(event, ErrorEvent)]


def cause_among(errors: Sequence[ErrorEvent]) -> ErrorEvent | None:
    """Return the first error that is more than the loss of another process."""
    return next((error for error in errors if error.reason != PeerLost.reason), None)
