"""The worker as a process: threads, environment, and its end when nobody waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tunewright_trainer.worker import cpu_limit, set_environment


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("10000 100000", 1), ("9900000 100000", None)],
    ids=["no limit", "one CPU", "one and a half", "a tenth", "more than there are"],
)
def test_threads_follow_the_container_s_limit(content: str, expected: int | None, tmp_path: Path) -> None:
    """The cgroup's quota is rounded up and never exceeds the process's own CPUs."""
    available = len(os.sched_getaffinity(0))
    limit = tmp_path / "cpu.max"
    limit.write_text(content + "\n")
    assert cpu_limit(limit) == min(available, expected or available)


def test_threads_without_a_cgroup(tmp_path: Path) -> None:
    """Where there is no cgroup file, all CPUs of the process count."""
    assert cpu_limit(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_environment_of_the_pod_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are set only where the pod says nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    set_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1234"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """When the supervisor is killed, the worker does not go on alone."""
    start = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-m', 'tunewright_trainer.worker', '--work', {str(tmp_path)!r}])\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 60
    while worker.num_threads() < 2 and time.monotonic() < deadline:  # until it watches its parent
        time.sleep(0.05)
    assert worker.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    worker.wait(timeout=60)
