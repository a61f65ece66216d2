"""Starts the programs of a cluster and finds them again, even after a crash of this tool.

Each process carries an environment variable that names its cluster's folder and its component, and so do its children
(containerd's shims). Unlike a file with process ids this cannot miss a process that was started just before a crash,
and a recycled id can never be taken for ours. Containers do not inherit the variable; they are known by their
control group. Linux only: all of this is read from /proc.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "TUNEWRIGHT_CLUSTER_PROCESS"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Process:
    """One running process of a cluster."""

    pid: int
    component: str
    """What `start` was told, `shim` for a pod's supervisor, `container` for a process in a pod."""


def cgroup(folder: Path) -> str:
    """Returns the name of the control group of the pods of the cluster in `folder`.

    A digest, and not the cluster's name: the same name may be in use in another cache folder.
    """
    return f"tunewright-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def start(
    component: str,
    command: Sequence[str],
    folder: Path,
    *,
    namespace: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Starts `command` detached from this process, in its own session, with its output in `folder`/logs.

    Args:
        component: name of the process, and of its log file.
        command: program and arguments.
        folder: folder of the cluster it belongs to.
        namespace: network namespace to run in; this process's own by default. Entered with nsenter and not with
            `ip netns exec`, which remounts /sys and so hides the cgroup mounts from the kubelet.
        environment: variables besides PATH and HOME. The caller's environment is not inherited: proxies and
            credentials of a developer's shell have no place in a test cluster.

    Raises:
        subprocess.CalledProcessError: the program could not be started.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    variables = {"PATH": SYSTEM_PATH, "HOME": str(Path.home()), **(environment or {})}
    entering = ["nsenter", f"--net=/var/run/netns/{namespace}"] if namespace else []
    with (logs / f"{component}.log").open("ab") as log:
        # `setsid --fork` makes it a child of init: it outlives us, and no zombie is left in a long test process.
        subprocess.run(
            ["setsid", "--fork", *entering, *command],
            env={**variables, _MARK: f"{folder}:{component}"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


def running(folder: Path) -> list[Process]:
    """Returns the processes of the cluster in `folder`, those in its pods included."""
    found = []
    for pid in _all_pids():
        component = _component(pid, folder)
        if component is not None:
            found.append(Process(pid, component))
    return found


def wait_until(ready: Callable[[], bool], folder: Path, component: str, limit_seconds: float = 120) -> None:
    """Polls `ready` every 0.1 s until it holds, as long as `component` of the cluster in `folder` runs.

    Raises:
        RuntimeError: the component ended, or `limit_seconds` (120: many times the usual, for a machine that is busy
            with a build) are over; the message carries the end of its log.
    """
    deadline = time.monotonic() + limit_seconds
    while not ready():
        alive = any(process.component == component for process in running(folder))
        if not alive or time.monotonic() > deadline:
            log = folder / "logs" / f"{component}.log"
            what = f"is not ready after {limit_seconds:.0f} s" if alive else "ended"
            raise RuntimeError(f"{component} {what}; end of {log}:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def stop(folder: Path, component: str | None = None, limit_seconds: float = 20) -> None:
    """Ends the processes of the cluster in `folder`, or only those of `component`, and returns when they are gone.

    They are killed without asking: a graceful end of the API server takes long, and no data of a test cluster is worth
    the wait. Repeated until none is found, since a dying cluster may still start some.

    Raises:
        TimeoutError: some are still there after `limit_seconds`; the message names them.
    """
    deadline = time.monotonic() + limit_seconds
    while found := [one for one in running(folder) if component in (None, one.component)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes of {folder} do not end: {found}; look for a hanging mount or disk")
        for process in found:
            _kill(process.pid, folder)


def _kill(pid: int, folder: Path) -> None:
    """Kills `pid` if it is still ours and waits up to 2 s for its end."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Asked again now that the handle pins the process: the id may have passed to another one in between.
        if _component(pid, folder) is not None:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], 2)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def _all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _component(pid: int, folder: Path) -> str | None:
    mark = f"{_MARK}={folder}:".encode()
    for variable in _read(pid, "environ").split(b"\0"):
        if variable.startswith(mark):
            # A shim outlives containerd, and must not be taken for it when that one has died.
            shim = _read(pid, "comm").startswith(b"containerd-shim")
            return "shim" if shim else variable.removeprefix(mark).decode()
    group = f"/{cgroup(folder)}/"
    for line in _read(pid, "cgroup").decode().splitlines():
        if line.split(":", 2)[2].startswith(group):
            return "container"
    return None


def _read(pid: int, file: str) -> bytes:
    # The process may end, or belong to somebody else: then it is none of ours.
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
