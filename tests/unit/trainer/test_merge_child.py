"""Steps in a process of their own, with real processes: what they answer, and what their end means."""

from __future__ import annotations

import os
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from pydantic import BaseModel

from tunewright_trainer.errors import InternalError, Killed, Preempted, TrainerError, fate_of
from tunewright_trainer.merge.child import Step, run_child
from tunewright_trainer.run_log import Redactor, RunLog
from tunewright_trainer.transfer import Stop

STEP = Step("own_step", "process that merges", "merge less")
HEAD = """\
import errno, os, signal, sys, time
from pathlib import Path
from pydantic import BaseModel
from tunewright_trainer.errors import InvalidAdapter
from tunewright_trainer.merge.child import serve

class Task(BaseModel):
    number: int

class Answer(BaseModel):
    text: str

def work(task):
"""
Run = Callable[..., str]


class Task(BaseModel):
    """What the step is told."""

    number: int


class Answer(BaseModel):
    """What the step answers."""

    text: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a body as the step, and returns its answer."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))

    def go(body: str, stop: Stop | None = None) -> str:
        code = HEAD + textwrap.indent(textwrap.dedent(body), "    ") + "\nsys.exit(serve(Task, work))\n"
        (tmp_path / "own_step.py").write_text(code)
        with RunLog(tmp_path / "log", Redactor({}), echo=False) as log:
            return run_child(STEP, Task(number=4), Answer, tmp_path, os.environ, log, stop or Stop()).text

    return go


def test_a_task_is_answered(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes back, credentials are not there, and what is printed is in the log."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert (
        run("print('hello'); return Answer(text=f'{task.number} {os.environ.get(\"AWS_SECRET_ACCESS_KEY\")}')")
        == "4 None"
    )
    assert "hello" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("body", "fate", "message"),
    [
        ("raise InvalidAdapter('s3://a is no adapter')", (20, "InvalidAdapter"), "s3://a is no adapter"),
        ("raise RuntimeError('odd')", (1, "InternalError"), r"RuntimeError: odd \(traceback in the log\)"),
        ("raise OSError(errno.ENOSPC, 'full')", (20, "DiskFull"), "no space left in .*ephemeralStorage"),
        ("raise RuntimeError('I/O error: x (os error 28)')", (20, "DiskFull"), "no space left in"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            (137, "Killed"),
            "the process that merges was killed.*resources.memory",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", (1, "InternalError"), "the process that merges crashed with SIGSEGV"),
        ("os._exit(0)", (1, "InternalError"), "ended without a result"),
    ],
)
def test_a_failure_is_the_steps_own(run: Run, body: str, fate: tuple[int, str], message: str) -> None:
    """Code, reason and message are those of the step; a death is explained."""
    with pytest.raises(TrainerError, match=message) as caught:
        run(body)
    assert fate_of(caught.value) == fate


def test_an_earlier_answer_is_not_taken_for_this_one(run: Run) -> None:
    """A step that is killed has no answer, even where one lies there from before."""
    assert run("return Answer(text='first')") == "first"
    with pytest.raises(Killed):
        run("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(InternalError):
        run("os._exit(3)")


def test_a_stop_ends_the_process(run: Run, tmp_path: Path) -> None:
    """The process is gone when the stop is answered."""
    stop = Stop()
    pid_file = tmp_path / "pid"

    def request() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.05)
        stop.request("asked to stop")

    threading.Thread(target=request, daemon=True).start()
    with pytest.raises(Preempted, match="asked to stop"):
        run(f"Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)", stop)
    assert not psutil.pid_exists(int(pid_file.read_text()))
