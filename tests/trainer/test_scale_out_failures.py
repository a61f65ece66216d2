"""Several processes that part: the cause is told where it happened, all others end too, and nothing is published."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.trainer.kit import ROWS, Bucket, bucket_run
from tests.trainer.pods import Pods, one_pod, two_pods
from tests.trainer.s3_fixtures import bucket, server, shared_bucket
from tunewright_api.exit_codes import ExitCode
from tunewright_api.run_config import RUN_ENVIRONMENT_VARIABLE
from tunewright_api.run_report import RunReport
from tunewright_trainer import launcher
from tunewright_trainer.protocol import TASK_FILE

__all__ = ["bucket", "server", "shared_bucket"]

pytestmark = pytest.mark.timeout(120)

LIGHT_WORKER = (sys.executable, "-m", "tests.trainer.light_worker")


@pytest.fixture
def inputs(bucket: Bucket) -> Bucket:
    """A bucket with a base model and rows."""
    bucket.fill()
    return bucket


def test_a_killed_process_of_the_pod_is_the_cause(inputs: Bucket, tmp_path: Path) -> None:
    """The first process loses its connection to the killed one, but what is reported is the kill."""
    pods = Pods(one_pod(bucket_run(inputs)), tmp_path, LIGHT_WORKER, LIGHT_WORKER="kill 1")
    (report,) = pods.reports_of_all()
    assert (report.exit_code, report.reason) == (ExitCode.KILLED, "Killed"), report.message
    assert (report.stage, report.step) == ("Training", 10)
    assert inputs.stored("out") == []


def test_an_error_of_any_process_is_reported(inputs: Bucket, tmp_path: Path) -> None:
    """What the second process gives up for has its own exit code, reason and message."""
    pods = Pods(one_pod(bucket_run(inputs)), tmp_path, LIGHT_WORKER, LIGHT_WORKER="refuse 1")
    (report,) = pods.reports_of_all()
    assert (report.exit_code, report.reason) == (ExitCode.INVALID_INPUT, "InvalidData")
    assert report.message == "row 3 of this process is unusable"


def test_the_other_pod_ends_too(inputs: Bucket, tmp_path: Path) -> None:
    """The pod that lost a process names the cause; the other one notices within seconds and says what it noticed."""
    pods = Pods(two_pods(bucket_run(inputs)), tmp_path, LIGHT_WORKER, LIGHT_WORKER="kill 1")
    first, second = pods.reports_of_all()
    assert (second.exit_code, second.reason) == (ExitCode.KILLED, "Killed"), second.message
    assert (first.exit_code, first.reason) == (ExitCode.INTERNAL_ERROR, "PeerLost"), first.message
    assert first.message.startswith("the connection to the other training processes is lost: see how the other pods")
    assert inputs.stored("out") == []


def test_a_late_pod_with_other_inputs(inputs: Bucket, tmp_path: Path) -> None:
    """A pod is waited for longer than retry.timeouts.stall; data that changed meanwhile are noticed before any step."""
    pods = Pods(two_pods(bucket_run(inputs, stall="1s")), tmp_path, LIGHT_WORKER, LIGHT_WORKER="finish")
    pods.start(0)
    wait_for(pods.settings[0].work / TASK_FILE)
    inputs.put("train.jsonl", ROWS + ROWS)
    time.sleep(2)
    pods.start(1)
    for report in (pods.join(0), pods.join(1)):
        assert (report.exit_code, report.reason) == (ExitCode.INTERNAL_ERROR, "InputsChanged"), report.message


def test_a_result_that_is_there_is_taken_by_all_pods(inputs: Bucket, tmp_path: Path) -> None:
    """Pods of a run that was published before end well without waiting for each other."""
    run = two_pods(bucket_run(inputs))
    published = Pods(run, tmp_path / "1", LIGHT_WORKER, LIGHT_WORKER="finish").reports_of_all()
    assert [report.reason for report in published] == ["Succeeded", "TookPart"]
    for rank, reason in enumerate(("Cached", "TookPart")):
        pods = Pods(run, tmp_path / "2", LIGHT_WORKER, LIGHT_WORKER="finish")
        pods.start(rank)
        report = pods.join(rank)
        assert (report.exit_code, report.reason) == (0, reason), report.message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pod_that_never_comes(inputs: Bucket, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods do not wait for ever, and say where they waited and what to look at."""
    monkeypatch.setattr(launcher, "RENDEZVOUS_SECONDS", 2)
    pods = Pods(two_pods(bucket_run(inputs)), tmp_path, LIGHT_WORKER, LIGHT_WORKER="finish")
    pods.start(rank)
    report = pods.join(rank)
    assert (report.exit_code, report.reason) == (ExitCode.INTERNAL_ERROR, "PeerLost")
    address = f"127.0.0.1:{pods.settings[rank].environment[launcher.PORT]}"
    assert report.message.startswith(f"the 2 pods of the run did not find each other at {address} (timeout 2 s): see ")
    assert "NetworkPolicy" in report.message


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(inputs: Bucket, tmp_path: Path, number: signal.Signals) -> None:
    """Launcher and workers end with the supervisor, in order or not."""
    environment = {
        **os.environ,
        **inputs.environment,
        RUN_ENVIRONMENT_VARIABLE: one_pod(bucket_run(inputs)).to_json(),
        "TUNEWRIGHT_WORK": str(tmp_path / "work"),
        "TUNEWRIGHT_TERMINATION_LOG": str(tmp_path / "termination"),
        "TUNEWRIGHT_PORT": "0",
    }
    # The real worker: while it imports the training stack, for seconds, nobody tells it that it is over.
    entry = subprocess.Popen([sys.executable, "-m", "tunewright_trainer"], env=environment, stdout=subprocess.DEVNULL)
    family = wait_for_workers(psutil.Process(entry.pid), 2)
    entry.send_signal(number)
    code = entry.wait(timeout=15)
    if number is signal.SIGTERM:
        assert code == ExitCode.PREEMPTED
        assert RunReport.model_validate_json((tmp_path / "termination").read_text()).reason == "Preempted"
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def wait_for_workers(supervisor: psutil.Process, count: int) -> list[psutil.Process]:
    """Wait until so many workers run; return them with their launcher."""
    deadline = time.monotonic() + 60
    while True:
        family = supervisor.children(recursive=True)
        if sum("tunewright_trainer.worker" in process.cmdline()[:3] for process in family) == count:
            return family
        assert time.monotonic() < deadline, family
        time.sleep(0.1)
