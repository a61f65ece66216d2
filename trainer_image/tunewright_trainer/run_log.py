"""The run's log: one file per attempt, the same lines on stdout, secrets blotted out."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

SECRET_VARIABLES = {
    "AWS_ACCESS_KEY_ID": 16,
    "AWS_SECRET_ACCESS_KEY": 8,
    "AWS_SESSION_TOKEN": 8,
    "HF_TOKEN": 8,
    "HUGGING_FACE_HUB_TOKEN": 8,
    "MLFLOW_TRACKING_TOKEN": 8,
    "MLFLOW_TRACKING_PASSWORD": 8,
}
"""Name, and the shortest value that is blotted out. Real access key ids have at least 16 characters; the `minio` of a
test service is part of many a word."""
PRIVATE_PREFIXES = ("AWS_", "MLFLOW_", *SECRET_VARIABLES)
"""Beginnings of the names of variables that are the supervisor's alone."""
MASK = "***"
MAX_LINE_CHARACTERS = 8192
TAIL_LINES = 20


def without_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for processes that need no credentials."""
    return {name: value for name, value in environment.items() if not name.startswith(PRIVATE_PREFIXES)}


class Redactor:
    """Blots out the values of secret environment variables wherever they turn up."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {environment[n] for n, shortest in SECRET_VARIABLES.items() if len(environment.get(n, "")) >= shortest}
        # Longest first: one secret may be the beginning of another.
        self._values = sorted(values, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return `text` without secrets."""
        for value in self._values:
            text = text.replace(value, MASK)
        return text


class RunLog:
    """Writes lines to the attempt's log file and to stdout. Safe to use from several threads."""

    def __init__(self, path: Path, redact: Redactor, *, echo: bool) -> None:
        """Open the file; `echo` also prints every line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._redact = redact
        self._echo = echo
        self._lock = threading.Lock()
        self._file = path.open("w", encoding="utf-8")
        self.lines = 0
        """How many were written: whoever writes is alive."""
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def say(self, text: str) -> None:
        """Write what the supervisor has to tell, with the time."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for line in text.splitlines():
            self._write(f"{stamp} {line}")

    def worker_line(self, line: str) -> None:
        """Write one line of the worker's output."""
        # A progress bar overwrites its line with carriage returns; only its last state is worth keeping.
        text = line.rstrip("\r\n").rpartition("\r")[2]
        with self._lock:
            self._tail.append(text)
        self._write(text)

    def last_worker_line(self) -> str:
        """Return the last line with something in it that the worker wrote, for a message."""
        with self._lock:
            return next((self._redact(line.strip()) for line in reversed(self._tail) if line.strip()), "")

    def flush(self) -> None:
        """Bring the file up to date."""
        with self._lock:
            self._file.flush()

    def _write(self, line: str) -> None:
        clean = self._redact(line)[:MAX_LINE_CHARACTERS] + "\n"
        with self._lock:
            self._file.write(clean)
            self.lines += 1
            if self._echo:
                sys.stdout.write(clean)
                sys.stdout.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
