"""Supervisors side by side, as in the pods of one run."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.cluster import ports
from tests.trainer.kit import WRITER
from tunewright_api.run_config import TrainRun
from tunewright_api.run_report import RunReport
from tunewright_trainer import supervisor
from tunewright_trainer.launcher import ADDRESS, NODE_RANK, PORT
from tunewright_trainer.settings import SupervisorSettings


def one_pod(run: TrainRun) -> TrainRun:
    """Let a run have two processes in one pod."""
    return run.model_copy(update={"processes": 2})


def two_pods(run: TrainRun) -> TrainRun:
    """Let a run have two pods with one process each."""
    return run.model_copy(update={"nodes": 2})


class Pods:
    """Supervisors of one run, each in a thread with a work folder of its own."""

    def __init__(self, run: TrainRun, folder: Path, worker: Sequence[str], **environment: str) -> None:
        self.run = run
        self.reports: dict[int, RunReport] = {}
        place = {ADDRESS: "127.0.0.1", PORT: str(ports.free(1)[0])} if run.nodes > 1 else {}
        self.settings = [
            SupervisorSettings(
                work=folder / str(rank),
                writer=WRITER,
                echo=False,
                worker_command=tuple(worker),
                environment={**os.environ, **environment, **place, NODE_RANK: str(rank)},
            )
            for rank in range(run.nodes)
        ]
        self._threads: dict[int, threading.Thread] = {}

    def start(self, rank: int) -> None:
        """Start the supervisor of a pod."""

        def supervise() -> None:
            self.reports[rank] = supervisor.run(self.run, self.settings[rank])

        self._threads[rank] = threading.Thread(target=supervise)
        self._threads[rank].start()

    def join(self, rank: int) -> RunReport:
        """Return the report of a pod once it has ended; its log is printed for the case that the test fails."""
        self._threads[rank].join()
        print(next((self.settings[rank].work / "logs").iterdir()).read_text())
        return self.reports[rank]

    def reports_of_all(self) -> list[RunReport]:
        """Run all pods and return their reports; no process is left."""
        for rank in range(self.run.nodes):
            self.start(rank)
        reports = [self.join(rank) for rank in range(self.run.nodes)]
        pids = [int(path.read_text()) for settings in self.settings for path in settings.work.glob("pid-*")]
        assert not [pid for pid in pids if is_alive(pid)]
        return reports


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended stays visible until its new parent takes notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
