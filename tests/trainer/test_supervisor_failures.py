"""Every way a run can fail in the trainer: exit code, reason and message, no result, and no worker left."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.s3_proxy import proxied
from tests.trainer.kit import ROWS, Bucket, bucket_run, make_settings
from tests.trainer.s3_fixtures import bucket, server, shared_bucket
from tunewright_api.exit_codes import OUTCOMES, ExitCode, Fate
from tunewright_api.run_report import RunReport
from tunewright_trainer import s3, supervisor

__all__ = ["bucket", "server", "shared_bucket"]

PROMPT = {"prompt": "p", "completion": "c"}


@pytest.fixture
def inputs(bucket: Bucket) -> Bucket:
    """A bucket with a base model and rows."""
    bucket.fill()
    return bucket


def fail(bucket: Bucket, work: Path, behaviour: str = "succeed", **spec: Any) -> RunReport:
    """Run, expecting a failure: a report that fits, nothing published, the worker gone."""
    settings = make_settings(work, behaviour, termination_log=work.with_name("termination"))
    report = supervisor.run(bucket_run(bucket, **spec), settings)
    assert report.exit_code != 0
    assert settings.termination_log is not None
    text = settings.termination_log.read_bytes()
    assert len(text) <= 4096
    assert RunReport.model_validate_json(text) == report
    assert bucket.server.secret_key not in report.message
    assert bucket.stored("out") == []
    pid = work / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))
    return report


def lines(*rows: Any) -> str:
    """Write rows as jsonl; strings stand as they are."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def broken_at_4711() -> str:
    """Return 5,000 rows of which one is cut short."""
    rows = [json.dumps(PROMPT)] * 5000
    rows[4710] = '{"prompt": "p", "compl'
    return "\n".join(rows)


Prepare = Callable[[Bucket], None]


@pytest.mark.parametrize(
    ("prepare", "spec", "reason", "message"),
    [
        (
            lambda b: b.client.delete_object(Bucket=b.name, Key="train.jsonl"),
            {},
            "MissingFile",
            "{data}: no such object",
        ),
        (lambda b: b.put("train.jsonl", ""), {}, "InvalidData", "{data}: the file is empty (0 bytes)"),
        (lambda b: b.put("train.jsonl", "\n"), {}, "InvalidData", "{data}: no rows"),
        (
            lambda b: b.put("train.jsonl", broken_at_4711()),
            {},
            "InvalidData",
            "1 bad row, nothing was trained:\n{data}: line 4,711: not valid JSON: Unterminated string starting at",
        ),
        (
            lambda b: b.put("train.jsonl", lines(PROMPT, {"prompt": "p", "completion": ""})),
            {},
            "InvalidData",
            "1 bad row, nothing was trained:\n{data}: line 2: completion: is empty",
        ),
        (
            lambda b: b.put("train.jsonl", lines({"question": "q", "answer": "a"})),
            {},
            "InvalidData",
            "{data}: line 1: columns 'question', 'answer' fit no format: ",
        ),
        (
            lambda b: None,
            {"format": "Text"},
            "InvalidData",
            "{data}: line 1: format Text: there is no column 'text': The columns are 'prompt', 'completion'; rename",
        ),
        (
            lambda b: None,
            {"columns": {"prompt": "promt"}},
            "InvalidData",
            "{data}: line 1: dataset.columns.prompt: there is no column 'promt': did you mean 'prompt'?",
        ),
        (lambda b: b.put("train.jsonl", b"\xff\xfe{"), {}, "InvalidData", "{data}: line 1: the text is UTF-16"),
        (
            lambda b: b.client.delete_object(Bucket=b.name, Key="base/config.json"),
            {},
            "InvalidModel",
            "{model}: no config.json: there are model.safetensors, pytorch_model.bin, tokenizer.json",
        ),
        (lambda b: b.put("base/config.json", "{"), {}, "InvalidModel", "{model}/config.json: not valid JSON"),
        (
            lambda b: b.client.delete_object(Bucket=b.name, Key="base/model.safetensors"),
            {},
            "InvalidModel",
            "{model}: no model.safetensors: the weights are pickles (pytorch_model.bin), which are never loaded",
        ),
        (
            lambda b: b.put("base/model.safetensors", b"\x10\0\0\0\0\0\0\0" + b"x" * 20),
            {},
            "InvalidModel",
            "{model}/model.safetensors: the safetensors header is damaged",
        ),
        (
            lambda b: b.client.delete_object(Bucket=b.name, Key="base/tokenizer.json"),
            {},
            "InvalidModel",
            "{model}: no tokenizer",
        ),
    ],
)
def test_bad_input(
    inputs: Bucket, tmp_path: Path, prepare: Prepare, spec: dict[str, Any], reason: str, message: str
) -> None:
    """What is wrong with the input is told by file, line and field, in seconds, and is not tried again."""
    prepare(inputs)
    dataset = {"train": [{"uri": f"s3://{inputs.name}/train.jsonl"}], **spec}
    started = time.monotonic()
    report = fail(inputs, tmp_path / "work", dataset=dataset)
    assert time.monotonic() - started < 5
    data, model = f"s3://{inputs.name}/train.jsonl", f"s3://{inputs.name}/base"
    assert (report.exit_code, report.reason) == (20, reason), report.message
    assert report.message.startswith(message.replace("{data}", data).replace("{model}", model))
    assert OUTCOMES[ExitCode(report.exit_code)].fate is Fate.FATAL


@pytest.mark.parametrize(
    ("spec", "reason", "message"),
    [
        (
            {"model": {"uri": "s3://not-there/base"}},
            "MissingBucket",
            "s3://not-there/base/: there is no bucket 'not-there'",
        ),
        (
            {"output": {"uri": "s3://not-there/out"}},
            "MissingBucket",
            "there is no bucket 'not-there' at http://127.0.0.1:",
        ),
        (
            {"model": {"uri": "s3://tests/bas"}},
            "MissingFile",
            "s3://tests/bas: no files are there: a model is named",
        ),
        ({"model": {"uri": "pvc://claim/base"}}, "MissingFile", "pvc://claim/base: no files are there"),
    ],
)
def test_wrong_places(inputs: Bucket, tmp_path: Path, spec: dict[str, Any], reason: str, message: str) -> None:
    """A bucket or prefix that is not there is named, the output's before anything is trained."""
    report = fail(inputs, tmp_path / "work", **spec)
    assert (report.exit_code, report.reason) == (20, reason)
    assert message in report.message


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """403 ends at once with code 21 and names the Secret, not what is in it."""
    monkeypatch.setenv(variable, "something-else")
    started = time.monotonic()
    report = fail(inputs, tmp_path / "work")
    assert time.monotonic() - started < 5
    assert (report.exit_code, report.reason) == (21, "AccessDenied")
    assert "Secret 's3-credentials'" in report.message
    assert variable in report.message
    assert "something-else" not in report.message


def test_a_wrong_endpoint(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint at which nothing listens is the user's mistake."""
    monkeypatch.setattr(s3, "FIRST_CONTACT_SECONDS", 1.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    report = fail(inputs, tmp_path / "work", endpoint=endpoint)
    assert (report.exit_code, report.reason) == (20, "EndpointUnreachable")
    assert report.message.startswith(f"no S3 service answers at {endpoint} (storage.endpoint): ")


def test_an_outage_at_the_end(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that goes away before the upload ends with code 23: a new attempt may fare better."""
    monkeypatch.setattr(s3, "OUTAGE_SECONDS", 1.0)
    with proxied(inputs.server) as proxy:
        proxy.only, proxy.always = "PUT ", "503"
        report = fail(inputs, tmp_path / "work", endpoint=proxy.endpoint)
    assert (report.exit_code, report.reason, report.stage) == (23, "StorageUnavailable", "Publishing")
    assert "all retries included: 503" in report.message
    assert OUTCOMES[ExitCode(report.exit_code)].fate is Fate.COUNTED_RETRY


def test_a_crash_before_the_manifest(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without a manifest are no result; the next attempt publishes under its own name."""
    monkeypatch.setattr(s3, "OUTAGE_SECONDS", 1.0)
    with proxied(inputs.server) as proxy:
        settings = make_settings(tmp_path / "1", writer="aaaaaaaa")
        proxy.only = "PUT /tests/out/"
        proxy.faults.extend(["pass"] * 7 + ["503"] * 200)  # seven files, then the manifest
        report = supervisor.run(bucket_run(inputs, endpoint=proxy.endpoint), settings)
    assert report.exit_code == 23
    assert any("aaaaaaaa" in key for key in inputs.stored("out"))
    assert not any(key.endswith("manifest.json") for key in inputs.stored("out"))
    again = supervisor.run(bucket_run(inputs), make_settings(tmp_path / "2", writer="bbbbbbbb"))
    assert (again.exit_code, again.cached) == (0, False)
    assert again.output is not None
    assert "/bbbbbbbb/" in again.output.uri


@pytest.mark.parametrize(
    ("behaviour", "code", "reason", "message"),
    [
        ("give up", 22, "GpuOutOfMemory", "the GPU is full: lower batchSize"),
        ("diverge", 24, "Diverged", "the loss became NaN at step 4"),
        ("killed", 137, "Killed", "the training process was killed (SIGKILL), most likely because the node or"),
        (
            "crash",
            1,
            "InternalError",
            "the training process crashed with SIGSEGV; its last line: Fatal Python error: Seg",
        ),
        ("nothing", 1, "InternalError", "the training process ended without a result"),
        ("nonsense", 1, "InternalError", "the training process wrote an event that cannot be read"),
        (
            "broken import",
            1,
            "InternalError",
            "the training process failed with exit code 1; its last line: ModuleNotFoundError: No module named 'torch'",
        ),
    ],
)
def test_the_worker_fails(inputs: Bucket, tmp_path: Path, behaviour: str, code: int, reason: str, message: str) -> None:
    """However the worker ends, the report says how, with the last step that was seen."""
    report = fail(inputs, tmp_path / "work", behaviour)
    assert (report.exit_code, report.reason) == (code, reason)
    assert report.message.startswith(message)
    if behaviour in ("give up", "killed"):
        assert (report.stage, report.step, report.total_steps, report.loss) == ("Training", 3, 10, 1.7)


def test_a_stall(inputs: Bucket, tmp_path: Path) -> None:
    """A worker that says nothing for retry.timeouts.stall is ended with code 26."""
    report = fail(inputs, tmp_path / "work", "stall", stall="1s")
    assert (report.exit_code, report.reason, report.step) == (26, "Stalled", 3)
    assert report.message == "no sign of progress for 1 s (retry.timeouts.stall) at stage Training, step 3"


def test_a_full_disk(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A work folder that is too small is told with the field that makes it larger."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(s3, "_allocate", full)
    report = fail(inputs, tmp_path / "work")
    assert (report.exit_code, report.reason) == (20, "DiskFull")
    assert report.message.endswith("raise resources.ephemeralStorage")


def test_all_bad_rows_are_in_the_log(inputs: Bucket, tmp_path: Path) -> None:
    """The status has room for some bad rows; the log has all that were looked for."""
    inputs.put("train.jsonl", ROWS + lines(*[{"prompt": "x" * 100, "completion": n} for n in range(30)]))
    report = fail(inputs, tmp_path / "work")
    assert report.message.startswith("at least 20 bad rows, nothing was trained:\n")
    log = (tmp_path / "work/logs/attempt-1.log").read_text()
    assert f"s3://{inputs.name}/train.jsonl: line 24: completion: must be a string, is a number" in log
