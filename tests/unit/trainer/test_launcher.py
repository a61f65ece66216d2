"""How several processes are started, and what is made of how they end."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tunewright_api.run_config import StorageSettings, TrainRun, build_train_run
from tunewright_api.run_report import RunReport
from tunewright_api.validation import parse_finetunejob
from tunewright_trainer import reports, worker
from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.launcher import (
    ADDRESS,
    NODE_RANK,
    PORT,
    Place,
    check_place,
    exit_code_of,
    find_place,
    launch_command,
)
from tunewright_trainer.protocol import EVENTS_FILE, ErrorEvent, parse_event, write_event

WORKER = ("python", "-m", "worker")
WORK = Path("/work")
POD = {NODE_RANK: "1", ADDRESS: "bot-train-1-0.bot-train-1", PORT: "29500"}


def make_run(nodes: int = 1, processes: int = 1, **spec: Any) -> TrainRun:
    """Return a run document."""
    given = {
        "model": {"uri": "hf://a/b"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "method": {"type": "LoRA"},
        "output": {"uri": "s3://models/out"},
        **spec,
    }
    document = {
        "apiVersion": "tunewright.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "t"},
        "spec": given,
    }
    job = parse_finetunejob(document)
    run = build_train_run(job.spec, name="t", namespace="n", attempt=1, storage=StorageSettings())
    return run.model_copy(update={"nodes": nodes, "processes": processes})


def test_one_process_is_started_by_itself() -> None:
    """Nothing stands between supervisor and worker where there is only one."""
    assert launch_command(make_run(), Place(), WORKER, WORK) == WORKER


@pytest.mark.parametrize(
    ("nodes", "processes", "meeting"),
    [
        (1, 4, ["--standalone", "--local-addr=127.0.0.1"]),
        (
            2,
            1,
            [
                "--node-rank=1",
                "--master-addr=bot-train-1-0.bot-train-1",
                "--master-port=29500",
                "--rdzv-conf=timeout=1800",
            ],
        ),
    ],
)
def test_the_launcher_gets_the_place_of_the_pod(nodes: int, processes: int, meeting: list[str]) -> None:
    """A pod alone takes a free port; several meet at the first one's address. Elastic restarts are off."""
    run = make_run(nodes, processes)
    command = launch_command(run, find_place(run, POD), WORKER, WORK)
    assert command == (
        *(sys.executable, "-m", "tunewright_trainer.launcher", "/work"),
        *(f"--nnodes={nodes}", f"--nproc-per-node={processes}", *meeting, "--max-restarts=0"),
        *("--shutdown-timeout=3", "--log-dir=/dev/null", "--no-python", *WORKER, "--collective-seconds=1800.0"),
    )


def test_the_limit_of_collective_operations_is_the_users() -> None:
    """hyperparameters.extra.ddp_timeout reaches the workers, which join before they know the task."""
    run = make_run(1, 2, hyperparameters={"extra": {"ddp_timeout": 60}})
    assert launch_command(run, Place(), WORKER, WORK)[-1] == "--collective-seconds=60"


def test_only_one_of_several_pods_is_the_first() -> None:
    """Rank and address come from the environment, and count only where there are several pods."""
    assert find_place(make_run(2), POD) == Place(1, "bot-train-1-0.bot-train-1", 29500)
    assert not find_place(make_run(2), POD).is_first
    assert find_place(make_run(1, 2), POD).is_first


@pytest.mark.parametrize(
    ("run", "environment", "message"),
    [
        (make_run(2), {ADDRESS: "a", PORT: "1"}, r"resources\.nodes is 2, but PET_NODE_RANK is not set: the operator"),
        (
            make_run(1, 2, objective={"type": "PPO", "ppo": {"rewards": [{"type": "JSON"}]}}),
            {},
            r"objective PPO trains in one process: set resources\.gpus to 0 or 1 and resources\.nodes to 1",
        ),
    ],
)
def test_what_cannot_work_is_refused(run: TrainRun, environment: dict[str, str], message: str) -> None:
    """Several pods without an operator, and PPO in several processes, are refused by the fields."""
    with pytest.raises(InvalidConfiguration, match=message):
        check_place(run, environment)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([1, -9], 137),
        ([-15, -15, 20], 20),
        ([-6, -9], 137),
        ([-11, 1], 139),
        ([-15], 1),
        ([22, 1], 22),
    ],
)
def test_what_killed_a_worker_is_the_cause(codes: list[int], expected: int) -> None:
    """A kill goes before the errors that it made elsewhere; the launcher's own SIGTERM is no cause."""
    assert exit_code_of(codes) == expected


def test_a_pod_that_took_part_reports_no_output() -> None:
    """The report of a further pod is a success without a result of its own."""
    report = reports.took_part(make_run(4), 2, "0" * 16)
    assert RunReport.model_validate_json(report.to_json()) == report
    assert (report.exit_code, report.output, report.stage) == (0, None, "Finished")
    assert report.message == "pod 2 of 4 (counted from 0) did its part; pod 0 reports the result"


def say_much(work: Path, number: int) -> None:
    """Append long events."""
    for _ in range(50):
        write_event(work, ErrorEvent(exit_code=number, reason="Long", message=str(number) * 50_000))


def test_events_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    """Every line is an event of one process, however long it is."""
    writers = [multiprocessing.get_context("fork").Process(target=say_much, args=(tmp_path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events = [parse_event(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert len(events) == 200
    assert all(isinstance(e, ErrorEvent) and e.message == str(e.exit_code) * 50_000 for e in events)


def test_processes_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process gets its share of the threads and a GPU; what the pod sets wins."""
    monkeypatch.setattr(worker, "cpu_limit", lambda: 9)
    monkeypatch.setattr(os, "environ", {"TOKENIZERS_PARALLELISM": "false"})
    worker.set_environment(4)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("2", "0,1,2,3")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
