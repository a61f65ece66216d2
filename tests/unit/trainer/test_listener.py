"""What is made of what workers say and of how they end, with real processes that only say it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tunewright_trainer.errors import TrainerError, fate_of
from tunewright_trainer.listener import Listener
from tunewright_trainer.protocol import Event
from tunewright_trainer.run_log import Redactor, RunLog
from tunewright_trainer.worker_process import WorkerProcess

WORKER = """
import os, sys, time
events = open(sys.argv[sys.argv.index("--work") + 1] + "/events.jsonl", "a", buffering=1)
def say(reason, code):
    events.write('{"event": "error", "exitCode": %d, "reason": "%s", "message": "m"}\\n' % (code, reason))
"""
LOST = "say('PeerLost', 1)"
REFUSED = "say('InvalidData', 20)"


def listen(folder: Path, script: str, *, expects_result: bool = True) -> tuple[Listener, list[Event]]:
    """Listen to a script until it has ended; what its end means is raised."""
    heard: list[Event] = []
    with RunLog(folder / "logs/log", Redactor({}), echo=False) as log:
        worker = WorkerProcess([sys.executable, "-c", WORKER + script, "--work", str(folder)], {}, log)
        listener = Listener(worker, folder, log, [heard.append], expects_result=expects_result)
        try:
            while worker.exit_code() is None:
                listener.listen()
                time.sleep(0.02)
            listener.listen()
        finally:
            worker.stop()
    return listener, heard


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"{LOST}; sys.exit(1)", "PeerLost"),
        (f"{REFUSED}; {LOST}; sys.exit(20)", "InvalidData"),
        (f"{LOST}; {REFUSED}; sys.exit(20)", "InvalidData"),
        (f"{LOST}; time.sleep(0.5); {REFUSED}; sys.exit(20)", "InvalidData"),
        (f"{LOST}; time.sleep(0.5); os._exit(137)", "Killed"),
        (f"{LOST}; time.sleep(0.5); os.kill(os.getpid(), 11)", "InternalError"),
        ("os._exit(137)", "Killed"),
        ("pass", "InternalError"),
    ],
)
def test_the_cause_goes_before_the_loss_of_a_peer(tmp_path: Path, script: str, reason: str) -> None:
    """Whatever a pod's workers lost each other by is what the pod reports, in whichever order it is noticed."""
    with pytest.raises(TrainerError) as caught:
        listen(tmp_path, script)
    assert fate_of(caught.value)[1] == reason


def test_workers_of_a_further_pod_end_without_a_result(tmp_path: Path) -> None:
    """Exit code 0 is all that is asked of them; they need not say anything."""
    listener, heard = listen(tmp_path, "pass", expects_result=False)
    assert (listener.ended_well, listener.heard, heard) == (True, False, [])
