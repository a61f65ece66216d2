"""A process that does the work (a worker, the launcher of several, a step of a merge): start, watch, end, and what its
death means."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunewright_api.exit_codes import ExitCode
from tunewright_trainer.errors import InternalError, Killed, PeerLost, TrainerError, WorkerFailure
from tunewright_trainer.protocol import ErrorEvent
from tunewright_trainer.run_log import RunLog, without_credentials

GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1
_CGROUP = Path("/sys/fs/cgroup")
_LOST_PEER = ("watchdog thread terminated with exception: NCCL error", "Watchdog caught collective operation timeout")
"""What PyTorch prints before it aborts a process whose GPU waits for one that is gone: no Python is left to say it."""
_LOG_END_BYTES = 1 << 18
_LIBC = ctypes.CDLL(None)


class WorkerProcess:
    """A started worker. Its output goes to the log line by line."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: RunLog, *, reads_storage: bool = False
    ) -> None:
        """Start the worker.

        It gets no credentials: everything it needs is on disk. It is the leader of a session, so that its own
        children end with it, and it is killed by the kernel when the supervisor dies.

        Args:
            command: Program and arguments.
            environment: Of the process, less credentials.
            log: Takes what it prints.
            reads_storage: It reads from S3 itself, and gets the credentials for that.
        """
        credentials = {name: value for name, value in environment.items() if name.startswith("AWS_") and reads_storage}
        self._log = log
        self._stopped = False
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=without_credentials(environment) | credentials | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._copy_output, name="worker-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id, which is the id of its session and process group as well."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return the exit code (negative: the signal), or None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, at most so long, then for the last of its output."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(GRACE_SECONDS)
        return self._process.returncode

    def stop(self, grace_seconds: float = 0.0) -> None:
        """End it and all its children; a second call does nothing.

        Args:
            grace_seconds: Time between SIGTERM and SIGKILL; 0 kills at once.
        """
        if self._stopped:
            return
        self._stopped = True
        if grace_seconds and self._process.poll() is None:
            os.killpg(self.pid, signal.SIGTERM)
            self.wait(grace_seconds)
        # The group may outlive its leader: data loader processes, a helper of torch.compile.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(GRACE_SECONDS)

    def _copy_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            while line := output.readline(65536):
                self._log.worker_line(line.decode(errors="replace"))


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def death_of(
    code: int,
    last_line: str,
    *,
    oom_kills: int,
    memory_limit: int | None,
    lost_peer: bool = False,
    process: str = "training process",
    saving: str = "lower batchSize or maxSequenceLength",
) -> TrainerError:
    """Say what it means that the worker ended without a result and without an error event.

    Args:
        code: Its exit code; negative or above 128 is a signal.
        last_line: The last thing it wrote.
        oom_kills: Processes that the kernel killed in this container for memory since the worker started.
        memory_limit: The container's memory limit in bytes, if it has one.
        lost_peer: It wrote that it waited for another process in vain.
        process: What messages call it.
        saving: What the user can do for it to need less memory.
    """
    code = 128 - code if code > 128 else code
    limit = f" of {memory_limit / 2**30:.1f} GiB" if memory_limit else ""
    if code == -signal.SIGKILL:
        if oom_kills:
            return Killed(
                f"the {process} went over the container's memory limit{limit} and was killed: raise "
                f"resources.memory, or {saving}"
            )
        return Killed(
            f"the {process} was killed (SIGKILL), most likely because the node or the container ran out of "
            f"memory{f' (limit{limit})' if limit else ''}: raise resources.memory"
        )
    said = f"; its last line: {last_line[:400]}" if last_line else ""
    if code == -signal.SIGABRT and lost_peer:
        return PeerLost(
            "the connection of the GPUs to the other training processes is lost: see how the other pods of the Job "
            f"ended; where none failed, see the log for NCCL's reason{said}"
        )
    if code < 0:
        return InternalError(f"the {process} crashed with {signal.Signals(-code).name}{said}")
    if code == 0:
        return InternalError(f"the {process} ended without a result{said}")
    return InternalError(f"the {process} failed with exit code {code}{said}")


def is_lost_peer(log: Path) -> bool:
    """Tell whether the end of a log says that a process waited for another one in vain."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_END_BYTES))
        end = file.read().decode(errors="replace")
    return any(text in end for text in _LOST_PEER)


def oom_kills(cgroup: Path = _CGROUP) -> int:
    """Return how many processes the kernel has killed for memory in this container; 0 outside of cgroup 2."""
    events = cgroup / "memory.events"
    if not events.is_file():
        return 0
    counts = dict(line.split() for line in events.read_text().splitlines())
    return int(counts.get("oom_kill", 0))


def memory_limit(cgroup: Path = _CGROUP) -> int | None:
    """Return the container's memory limit in bytes, None where there is none."""
    path = cgroup / "memory.max"
    if not path.is_file() or (text := path.read_text().strip()) == "max":
        return None
    return int(text)


def failure_of(event: ErrorEvent) -> TrainerError:
    """Return the error that the worker reported."""
    try:
        return WorkerFailure(ExitCode(event.exit_code), event.reason, event.message)
    except ValueError:
        return InternalError(f"the training process ended with exit code {event.exit_code}: {event.message}")
