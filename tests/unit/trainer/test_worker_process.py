"""What a worker's death means, and what is blotted out of its output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewright_trainer.errors import InternalError, Killed, PeerLost, TrainerError
from tunewright_trainer.run_log import Redactor, RunLog
from tunewright_trainer.worker_process import death_of, is_lost_peer, memory_limit, oom_kills


@pytest.mark.parametrize(
    ("code", "kills", "limit", "kind", "message"),
    [
        (
            -9,
            1,
            4 * 2**30,
            Killed,
            "went over the container's memory limit of 4.0 GiB and was killed: raise resources.mem",
        ),
        (137, 1, None, Killed, "went over the container's memory limit and was killed"),
        (
            -9,
            0,
            2**30,
            Killed,
            "was killed (SIGKILL), most likely because the node or the container ran out of memory (limit",
        ),
        (-11, 0, None, InternalError, "crashed with SIGSEGV; its last line: boom"),
        (139, 0, None, InternalError, "crashed with SIGSEGV; its last line: boom"),
        (0, 0, None, InternalError, "ended without a result; its last line: boom"),
        (3, 0, None, InternalError, "failed with exit code 3; its last line: boom"),
    ],
)
def test_a_death_is_explained(code: int, kills: int, limit: int | None, kind: type[TrainerError], message: str) -> None:
    """The kernel's own count of kills tells a memory limit from other reasons."""
    error = death_of(code, "boom", oom_kills=kills, memory_limit=limit)
    assert type(error) is kind
    assert str(error).startswith(f"the training process {message}")


NCCL = (
    "[rank1]:[E1122 12:00:00.0 ProcessGroupNCCL.cpp:1895] [PG ID 0 PG GUID 0 Rank 1] Process group watchdog thread "
    "terminated with exception: NCCL error: remote process exited or there was a network error\n"
)


@pytest.mark.parametrize(
    ("log", "kind"), [(NCCL + "frame #0: c10::Error\n" * 100, PeerLost), ("boom\n", InternalError)]
)
def test_a_gpu_that_waits_in_vain_has_lost_its_peer(tmp_path: Path, log: str, kind: type[TrainerError]) -> None:
    """PyTorch aborts such a process from a thread of its own; only its log tells that from another crash."""
    (tmp_path / "log").write_text(log)
    lost = is_lost_peer(tmp_path / "log")
    assert type(death_of(134, "boom", oom_kills=0, memory_limit=None, lost_peer=lost)) is kind


def test_the_cgroup_is_read(tmp_path: Path) -> None:
    """Kills and limit come from cgroup 2; without it there are none."""
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (0, None)
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (2, 2**30)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) is None


def test_secrets_are_blotted_out() -> None:
    """The longest secret goes first; short made-up key ids, which are part of ordinary words, stay."""
    redact = Redactor(
        {
            "AWS_ACCESS_KEY_ID": "minio",
            "AWS_SECRET_ACCESS_KEY": "abcdefgh",
            "AWS_SESSION_TOKEN": "abcdefgh-longer",
            "HF_TOKEN": "",
            "PATH": "/usr/bin",
        }
    )
    assert redact("minio abcdefgh abcdefgh-longer /usr/bin") == "minio *** *** /usr/bin"


def test_a_progress_bar_leaves_its_last_state(tmp_path: Path) -> None:
    """Carriage returns do not fill the log, and the last line with something in it is at hand."""
    with RunLog(tmp_path / "logs/a.log", Redactor({}), echo=False) as log:
        log.worker_line("  0%\r 50%\r100%\n")
        log.worker_line("\n")
        assert log.last_worker_line() == "100%"
    assert (tmp_path / "logs/a.log").read_text() == "100%\n\n"
