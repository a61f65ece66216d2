"""The supervisor from document to report, against a real S3 server, with a worker that only plays training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import ports
from tests.s3_proxy import proxied
from tests.trainer.kit import (
    FAKE_WORKER,
    ROWS,
    WRITER,
    Bucket,
    bucket_run,
    make_run,
    make_settings,
    safetensors,
)
from tests.trainer.s3_fixtures import bucket, server, shared_bucket
from tunewright_api.run_report import Progress, RunReport
from tunewright_trainer import supervisor
from tunewright_trainer.artifact import download_artifact
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.storage import Storage

__all__ = ["bucket", "server", "shared_bucket"]


@pytest.fixture
def inputs(bucket: Bucket) -> Bucket:
    """A bucket with a base model and rows."""
    bucket.fill()
    return bucket


def run(bucket: Bucket, settings: SupervisorSettings, **spec: Any) -> RunReport:
    """Run on the inputs of a bucket and make sure that the worker is gone afterwards."""
    report = supervisor.run(bucket_run(bucket, **spec), settings)
    worker = settings.work / "pid"
    if worker.exists():
        assert not psutil.pid_exists(int(worker.read_text()))
    return report


def test_a_run_is_published(inputs: Bucket, tmp_path: Path) -> None:
    """Everything a user needs lies in the run's folder, and what PEFT loads verifies."""
    settings = make_settings(tmp_path / "work", termination_log=tmp_path / "termination")
    report = run(inputs, settings)
    assert (report.exit_code, report.reason, report.stage, report.step) == (0, "Succeeded", "Finished", 10)
    assert report.evaluation is not None
    assert report.evaluation.document() == {"base": 2.5, "tuned": 1.25, "improvement": 1.25}
    assert report.plan is not None
    assert (report.plan.train_rows, report.plan.validation_rows) == (3, 1)
    assert (tmp_path / "termination").read_text() == report.to_json()
    own = f"out/{report.run_key}/{WRITER}"
    names = ["README.md", "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    names += ["logs/attempt-1.log", "metrics.jsonl", "report.json", "run.json"]
    names = [f"{own}/{name}" for name in names]
    assert inputs.stored("out") == [*names, f"out/{report.run_key}/manifest.json", "out/latest.json"]
    assert inputs.json(f"{own}/report.json") == json.loads(report.model_dump_json(by_alias=True, exclude_none=True))
    document = inputs.json(f"{own}/run.json")
    assert document["inputs"]["data"][0]["bytes"] == len(ROWS)
    assert document["data"]["format"] == "PromptCompletion"
    assert report.output is not None
    storage = Storage(bucket_run(inputs).storage)
    manifest = download_artifact(report.output.uri, tmp_path / "got", storage)
    assert manifest.metrics["evaluation"]["improvement"] == 1.25
    assert "An adapter for `s3://tests/base`" in (tmp_path / "got/README.md").read_text()


def test_the_numbers_are_kept(inputs: Bucket, tmp_path: Path) -> None:
    """metrics.jsonl has every logged step and both evaluations, as JSON that any reader takes."""
    report = run(inputs, make_settings(tmp_path / "work"))
    body = inputs.client.get_object(Bucket=inputs.name, Key=f"out/{report.run_key}/{WRITER}/metrics.jsonl")["Body"]
    lines = [json.loads(line) for line in body.read().splitlines()]
    assert [line["step"] for line in lines] == [0, *range(1, 11), 10]
    assert (lines[0]["evalLoss"], lines[-1]["evalLoss"]) == (2.5, 1.25)
    assert lines[3]["loss"] == pytest.approx(1.7)
    assert lines[3]["metrics"] == {"reward": 0.3, "reward_min": 0.0}


def test_the_same_run_is_not_trained_again(inputs: Bucket, tmp_path: Path) -> None:
    """A second run of the same content reports the first one's result and numbers, and writes nothing."""
    first = run(inputs, make_settings(tmp_path / "1"))
    before = inputs.stored()
    second = run(inputs, make_settings(tmp_path / "2", "stall", writer="bbbbbbbb"))
    assert (second.exit_code, second.reason, second.cached) == (0, "Cached", True)
    assert (second.output, second.evaluation, second.loss) == (first.output, first.evaluation, first.loss)
    assert inputs.stored() == before


def test_changed_data_is_another_run(inputs: Bucket, tmp_path: Path) -> None:
    """New rows under the same name give another run key; both results stay in the same output folder."""
    first = run(inputs, make_settings(tmp_path / "1"))
    inputs.put("train.jsonl", ROWS + ROWS)
    second = run(inputs, make_settings(tmp_path / "2"))
    assert second.cached is False
    assert first.run_key != second.run_key
    assert inputs.json("out/latest.json")["runKey"] == second.run_key


def test_two_attempts_at_once_publish_one_result(inputs: Bucket, tmp_path: Path) -> None:
    """Two pods of the same run that end together: both succeed, one result is valid."""
    reports: list[RunReport] = []

    def attempt(writer: str) -> None:
        settings = make_settings(tmp_path / writer, writer=writer)
        reports.append(supervisor.run(bucket_run(inputs), settings))

    threads = [threading.Thread(target=attempt, args=(letter * 8,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.exit_code for report in reports] == [0, 0]
    assert reports[0].output == reports[1].output
    assert sum("manifest.json" in key for key in inputs.stored("out")) == 1


def test_pvc_and_local_paths(tmp_path: Path) -> None:
    """Model, data and output may lie on mounted volumes and, in a local run, anywhere; there is no S3 then."""
    volume = tmp_path / "pvc" / "claim"
    (volume / "base").mkdir(parents=True)
    for name, content in {"config.json": b'{"model_type": "llama"}', "model.safetensors": safetensors()}.items():
        (volume / "base" / name).write_bytes(content)
    (volume / "base/tokenizer.json").write_text("{}")
    (volume / "train.jsonl").write_text(ROWS)
    for prefix, local in (("pvc://claim", False), (str(volume), True)):
        document = make_run(
            None,
            local=local,
            model={"uri": f"{prefix}/base"},
            dataset={"train": [{"uri": f"{prefix}/train.jsonl"}]},
            output={"uri": f"{prefix}/out"},
        )
        settings = make_settings(tmp_path / "work", pvc_root=tmp_path / "pvc", local=local)
        report = supervisor.run(document, settings)
        assert report.exit_code == 0, report.message
        assert report.output is not None
        assert report.output.uri == f"{prefix}/out/{report.run_key}/{WRITER}/adapter"
        assert (volume / "out" / str(report.run_key) / "manifest.json").is_file()


def test_checking_says_how_far_it_is(tmp_path: Path) -> None:
    """While many rows are checked, the percentage grows with the bytes read."""
    folder = tmp_path / "base"
    folder.mkdir()
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": safetensors(), "tokenizer.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (tmp_path / "train.jsonl").write_text(ROWS * 25_000)
    seen: list[Progress] = []
    document = make_run(
        None,
        local=True,
        model={"uri": str(folder)},
        dataset={"train": [{"uri": str(tmp_path / "train.jsonl")}]},
        output={"uri": str(tmp_path / "out")},
    )
    supervisor.run(document, make_settings(tmp_path / "work", local=True, on_progress=seen.append))
    percents = [progress.percent for progress in seen if progress.stage == "Checking"]
    assert percents == sorted(percents)
    assert len(percents) > 10
    assert percents[-1] == 100.0


def test_s3_may_fail_all_the_way(inputs: Bucket, tmp_path: Path) -> None:
    """With every second request answered 503 or dropped, at all stages, the run still ends well."""
    with proxied(inputs.server) as proxy:
        proxy.faults = deque(["pass", *["503", "pass", "drop", "pass", "500", "pass"] * 30])
        report = run(inputs, make_settings(tmp_path / "work"), endpoint=proxy.endpoint)
    assert (report.exit_code, report.reason) == (0, "Succeeded"), report.message


def test_progress_is_served(inputs: Bucket, tmp_path: Path) -> None:
    """/progress, /metrics and /healthz answer while the worker trains, and the port is free afterwards."""
    port = ports.free(1, "127.0.0.1")[0]
    settings = make_settings(tmp_path / "work", "stall", port=port)
    thread = threading.Thread(target=supervisor.run, args=(bucket_run(inputs), settings))
    thread.start()
    try:
        progress = wait_for_step(port, 3)
        metrics = get(port, "/metrics")
        health = get(port, "/healthz")
    finally:
        settings.stop.request("the test is over")
        thread.join()
    assert (progress.stage, progress.total_steps, progress.percent) == ("Training", 10, 30.0)
    assert progress.loss_history == [(1, 1.9), (2, 1.8), (3, 1.7)]
    assert "tunewright_trainer_step 3.0" in metrics
    assert 'tunewright_trainer_stage{stage="Training"} 1.0' in metrics
    assert health == "ok\n"
    with pytest.raises(OSError, match="refused"):
        get(port, "/healthz")


def get(port: int, path: str) -> str:
    """GET from the supervisor."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def wait_for_step(port: int, step: int) -> Progress:
    """Wait until the progress shows a step."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            progress = Progress.model_validate_json(get(port, "/progress"))
        except OSError:
            progress = None
        if progress is not None and progress.step >= step:
            return progress
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def test_secrets_stay_secret(inputs: Bucket, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Credentials reach neither the worker nor any log, message or published file, even if something prints them."""
    secret, key_id = inputs.server.secret_key, "AKIAIOSFODNN7EXAMPLE"
    leak = {**inputs.environment, "AWS_ACCESS_KEY_ID": key_id, "LEAK": f"{secret} {key_id}"}
    report = run(inputs, make_settings(tmp_path / "work", environment=leak, echo=True))
    assert report.exit_code == 0
    printed = "".join(capfd.readouterr())
    assert "leaking *** *** []" in printed
    stored = [inputs.client.get_object(Bucket=inputs.name, Key=key)["Body"].read() for key in inputs.stored("out")]
    for text in (printed.encode(), *stored, (tmp_path / "work/logs/attempt-1.log").read_bytes()):
        assert secret.encode() not in text
        assert key_id.encode() not in text


def entry_environment(bucket: Bucket, tmp_path: Path, behaviour: str, **changes: str) -> dict[str, str]:
    """Build the environment of the container."""
    return {
        "PATH": os.environ["PATH"],
        **bucket.environment,
        "TUNEWRIGHT_RUN": bucket_run(bucket).to_json(),
        "TUNEWRIGHT_WRITER": "0A1B2C3D-4e5f-0000-0000-000000000000",
        "TUNEWRIGHT_WORK": str(tmp_path / "work"),
        "TUNEWRIGHT_TERMINATION_LOG": str(tmp_path / "termination"),
        "TUNEWRIGHT_PORT": "0",
        "FAKE_WORKER": behaviour,
        **changes,
    }


# Runs the entry point with the fake worker and without torch: importing it fails the way an image without it would.
ENTRY = """
import runpy, sys
for name in ("torch", "transformers", "peft", "trl", "datasets", "pyarrow", "huggingface_hub"):
    sys.modules[name] = None
from tunewright_trainer import settings
command = tuple(sys.argv[1:])
original = settings.SupervisorSettings.__init__
def patched(self, *args, **kwargs):
    original(self, *args, **{"worker_command": command, **kwargs})
settings.SupervisorSettings.__init__ = patched
sys.argv = ["tunewright_trainer"]
runpy.run_module("tunewright_trainer", run_name="__main__")
"""


def start_entry(bucket: Bucket, tmp_path: Path, behaviour: str, **changes: str) -> subprocess.Popen[str]:
    """Start the container's entry point."""
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, *FAKE_WORKER],
        env=entry_environment(bucket, tmp_path, behaviour, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_training(tmp_path: Path) -> int:
    """Wait until the supervisor has seen the third step; return the worker's process id."""
    seen = tmp_path / "work/metrics.jsonl"
    deadline = time.monotonic() + 30
    while not (seen.exists() and '"step": 3' in seen.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int((tmp_path / "work/pid").read_text())


def termination(tmp_path: Path) -> RunReport:
    """Read the termination message as the operator does."""
    text = (tmp_path / "termination").read_text()
    assert len(text.encode()) <= 4096
    return RunReport.model_validate_json(text)


def test_the_entry_point_needs_no_torch(inputs: Bucket, tmp_path: Path) -> None:
    """The container's command publishes with the training stack unimportable in the supervisor."""
    process = start_entry(inputs, tmp_path, "succeed")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    report = termination(tmp_path)
    assert (report.reason, report.output is not None) == ("Succeeded", True)
    assert f"out/{report.run_key}/{WRITER}/run.json" in inputs.stored()


def test_sigterm_ends_in_order(inputs: Bucket, tmp_path: Path) -> None:
    """A pod that is asked to stop says so with exit code 25, publishes nothing and leaves no process behind."""
    process = start_entry(inputs, tmp_path, "stall")
    worker = wait_for_training(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 25
    process.communicate()
    report = termination(tmp_path)
    assert (report.exit_code, report.reason, report.step) == (25, "Preempted", 3)
    assert report.message.startswith("the pod was asked to stop (SIGTERM): ")
    assert not psutil.pid_exists(worker)
    assert inputs.stored("out") == []


def test_a_deaf_worker_is_killed(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ignores SIGTERM does not hold up the pod's end for longer than the grace period."""
    process = start_entry(inputs, tmp_path, "deaf")
    worker = wait_for_training(tmp_path)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 25
    assert time.monotonic() - started < 12
    process.communicate()
    assert not psutil.pid_exists(worker)


def test_no_orphans_after_sigkill(inputs: Bucket, tmp_path: Path) -> None:
    """When the supervisor is killed the kernel kills the worker."""
    process = start_entry(inputs, tmp_path, "stall")
    worker = psutil.Process(wait_for_training(tmp_path))
    process.kill()
    process.communicate()
    worker.wait(timeout=5)


def test_children_of_the_worker_end_with_it(inputs: Bucket, tmp_path: Path) -> None:
    """Data loaders and compile helpers of a stopped worker do not stay."""
    settings = make_settings(tmp_path / "work", "child")
    timer = threading.Thread(
        target=lambda: (wait_for_training(tmp_path), settings.stop.request("the test is over"))  # type: ignore[func-returns-value]
    )
    timer.start()
    assert run(inputs, settings).exit_code == 25
    timer.join()
    child = int((tmp_path / "work/child").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_broken_document_is_reported(inputs: Bucket, tmp_path: Path) -> None:
    """A document of another version, or none, ends with code 20 and a report, before anything is started."""
    process = start_entry(inputs, tmp_path, "succeed", TUNEWRIGHT_RUN='{"version": 7}')
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 20, output
    report = termination(tmp_path)
    assert report.reason == "InvalidConfiguration"
    assert "TUNEWRIGHT_RUN does not fit this trainer" in report.message
    assert not (tmp_path / "work").exists()


def test_a_fault_of_our_own_is_reported(inputs: Bucket, tmp_path: Path) -> None:
    """What nobody foresaw ends with code 1, a report and a traceback in the log; the worker is gone."""
    (tmp_path / "work").write_text("a file where the work folder should be")
    process = start_entry(inputs, tmp_path, "succeed")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback (most recent call last)" in output
    report = termination(tmp_path)
    assert (report.exit_code, report.reason) == (1, "InternalError")
    assert report.message.startswith("FileExistsError: ")


def test_an_earlier_process_leaves_no_trace(inputs: Bucket, tmp_path: Path) -> None:
    """A restarted container begins with the inputs, not with what an earlier worker said or wrote."""
    work = tmp_path / "work"
    settings = make_settings(work, "give up")
    assert run(inputs, settings).exit_code == 22
    (work / "output/adapter").mkdir(parents=True)
    (work / "output/adapter/old.json").write_text("{}")
    again = replace(settings, environment={**settings.environment, "FAKE_WORKER": "succeed"})
    report = run(inputs, again)
    assert report.exit_code == 0
    assert not [key for key in inputs.stored("out") if "old.json" in key]
