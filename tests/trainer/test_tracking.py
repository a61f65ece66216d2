"""Tracking: files that TensorBoard and `wandb sync` read, and a real MLflow server that shows the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cluster import ports
from tests.trainer.kit import MODEL_FILES, ROWS, make_run, make_settings
from tests.wandb_server import WandbServer
from tunewright_api.run_report import RunReport
from tunewright_trainer import mlflow, supervisor
from tunewright_trainer.wandb import OfflineRun

pytestmark = pytest.mark.timeout(400)

START_SECONDS = 240
_JSON = {"Content-Type": "application/json"}
ONE = ("--workers", "1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server on loopback with a SQLite store; its URL."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = ports.free(1)[0]
    store = ["--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port), *ONE],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{url}/health", process, folder / "log")
            yield url
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310  loopback
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.3)
        else:
            return


def run(
    folder: Path, behaviour: str = "succeed", environment: dict[str, str] | None = None, **tracking: Any
) -> RunReport:
    """Run with local paths and the fake worker."""
    base = folder / "base"
    base.mkdir(parents=True)
    for name, content in MODEL_FILES.items():
        (base / name).write_bytes(content)
    (folder / "train.jsonl").write_text(ROWS)
    document = make_run(
        None,
        local=True,
        model={"uri": str(base)},
        dataset={"train": [{"uri": str(folder / "train.jsonl")}], "validationFraction": 0.25},
        output={"uri": str(folder / "out")},
        tracking=tracking,
    )
    return supervisor.run(
        document, make_settings(folder / "work", behaviour, local=True, environment=environment or {})
    )


def log_of(folder: Path) -> str:
    """Return the run's log."""
    return (folder / "work" / "logs" / "attempt-1.log").read_text()


def ask(server: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Call MLflow's API."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/{path}", data, _JSON)  # noqa: S310  loopback
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.loads(answer.read())


def only_run(server: str, experiment: str) -> Any:
    """Return the one run of an experiment."""
    found = ask(server, f"experiments/get-by-name?experiment_name={experiment}")["experiment"]["experiment_id"]
    (only,) = ask(server, "runs/search", {"experiment_ids": [found]})["runs"]
    return only


def test_tensorboard_reads_the_published_files(tmp_path: Path) -> None:
    """Every step and both evaluations are there under their names; files are part of the result."""
    report = run(tmp_path, tensorboard=True)
    assert report.output is not None
    (file,) = (tmp_path / "out").rglob("tensorboard/events.out.tfevents.*.support-bot")
    manifest = json.loads(Path(report.output.manifest_uri).read_text())
    assert any(entry["path"].endswith(f"tensorboard/{file.name}") for entry in manifest["files"])
    read = EventAccumulator(str(file.parent))
    read.Reload()
    losses = read.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 11))
    assert [event.value for event in losses] == pytest.approx([2.0 - step / 10 for step in range(1, 11)])
    assert [(event.step, event.value) for event in read.Scalars("eval/loss")] == [(0, 2.5), (10, 1.25)]
    assert abs(losses[0].wall_time - time.time()) < 600


def sync(path: Path, home: Path) -> WandbServer:
    """Send an offline run by W&B's own command; return what arrived."""
    home.mkdir()
    with WandbServer.start() as server:
        # Nothing but its own variables: the command sees no account of whoever runs the tests.
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "WANDB_BASE_URL": server.url}
        environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}
        command = [sys.executable, "-m", "wandb", "sync", str(path)]
        done = subprocess.run(
            command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    return server


def test_wandb_sync_sends_the_published_run(tmp_path: Path) -> None:
    """Numbers of a step in one row, what was asked for as the configuration, and the end."""
    report = run(tmp_path, wandb={"project": "bots", "entity": "team"})
    assert report.output is not None
    (file,) = (tmp_path / "out").rglob("wandb/offline-run-*/run-*.wandb")
    manifest = json.loads(Path(report.output.manifest_uri).read_text())
    assert any(entry["path"].endswith(f"{file.parent.name}/{file.name}") for entry in manifest["files"])
    server = sync(file.parent, tmp_path / "home")
    shown = {name: server.run[name] for name in ("project", "entity", "displayName")}
    assert shown == {"project": "bots", "entity": "team", "displayName": "support-bot"}
    assert server.config["hyperparameters"]["value"]["learningRate"] == 2e-4
    assert [row["_step"] for row in server.rows] == list(range(11))
    assert [row["train/loss"] for row in server.rows[1:]] == pytest.approx([2.0 - step / 10 for step in range(1, 11)])
    assert (server.rows[0]["eval/loss"], server.rows[10]["eval/loss"]) == (2.5, 1.25)
    assert (server.summary["eval/loss"], server.exit_code) == (1.25, 0)


def test_a_long_run_of_wandb_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records go on in the next block of the file where one ends; writing them opens no socket."""
    with monkeypatch.context() as patched:
        patched.delattr("socket.socket")
        started = 1_795_000_000.5
        offline = OfflineRun(tmp_path, "0a1b2c3d", project="p", entity="e", name="n", started=started, config={})
        for step in range(1000):
            numbers = {f"metric/{name}": step + name / 8 for name in range(step % 53 + 1)}
            offline.write(started + step, step, numbers)
        offline.finish(started + 1000)
    assert offline.path.stat().st_size > 10 * 32768
    server = sync(offline.path, tmp_path / "home")
    rows = [{key: value for key, value in row.items() if key.startswith("metric/")} for row in server.rows]
    assert rows == [{f"metric/{name}": step + name / 8 for name in range(step % 53 + 1)} for step in range(1000)]
    assert [row["_runtime"] for row in server.rows] == list(range(1000))


def test_without_tracking_there_are_no_files(tmp_path: Path) -> None:
    """Nothing is written that nobody asked for."""
    run(tmp_path)
    assert not [path for name in ("tensorboard*", "wandb*") for path in (tmp_path / "out").rglob(name)]


def test_mlflow_shows_the_run(server: str, tmp_path: Path) -> None:
    """Parameters, every number with its step, and the end."""
    report = run(tmp_path, mlflow={"uri": server, "experiment": "team-a"})
    assert report.exit_code == 0
    found = only_run(server, "team-a")
    assert (found["info"]["run_name"], found["info"]["status"]) == ("support-bot", "FINISHED")
    parameters = {entry["key"]: entry["value"] for entry in found["data"]["params"]}
    assert (parameters["method"], parameters["hyperparameters.learningRate"]) == ("LoRA", "0.0002")
    history = ask(server, f"metrics/get-history?run_id={found['info']['run_id']}&metric_key=train/loss")["metrics"]
    assert {entry["step"]: entry["value"] for entry in history} == pytest.approx(
        {step: 2.0 - step / 10 for step in range(1, 11)}
    )
    assert {entry["key"]: entry["value"] for entry in found["data"]["metrics"]}["eval/loss"] == 1.25


def test_mlflow_shows_a_failed_run(server: str, tmp_path: Path) -> None:
    """A run that gave up is no finished one, and what it had logged is there; the namespace is the experiment."""
    assert run(tmp_path, "give up", mlflow={"uri": server}).exit_code == 22
    found = only_run(server, "ml")
    assert found["info"]["status"] == "FAILED"
    assert {entry["key"] for entry in found["data"]["metrics"]} >= {"train/loss", "eval/loss"}


def test_a_server_that_is_down_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run succeeds, and the log says what is missing and where it is."""
    monkeypatch.setattr(mlflow, "CLOSE_SECONDS", 3.0)
    report = run(tmp_path, mlflow={"uri": f"http://127.0.0.1:{ports.free(1)[0]}"})
    assert (report.exit_code, report.reason) == (0, "Succeeded")
    log = log_of(tmp_path)
    assert "Connection refused" in log
    assert "numbers: metrics.jsonl has them" in log


def test_a_server_that_never_answers_costs_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the network does, the end of the run does not wait longer than its limit."""
    import socket

    monkeypatch.setattr(mlflow, "CLOSE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        report = run(tmp_path, mlflow={"uri": f"http://127.0.0.1:{port}"})
    assert report.exit_code == 0
    assert "numbers: metrics.jsonl has them" in log_of(tmp_path)


def test_credentials_go_to_the_server_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker does not see them, the log does not show them, and the server gets them as MLflow's client sends
    them; a refusal is said once and not tried again."""
    import http.server
    import threading

    seen: list[str | None] = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            body = b"bad token secret-token-1"
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        secret = {"MLFLOW_TRACKING_TOKEN": "secret-token-1", "LEAK": "secret-token-1"}
        report = run(tmp_path, environment=secret, mlflow={"uri": f"http://127.0.0.1:{refusing.server_port}"})
        refusing.shutdown()
    assert report.exit_code == 0
    assert seen == ["Bearer secret-token-1"]
    log = log_of(tmp_path)
    assert log.count("MLflow answers 401: bad token ***") == 1
    assert "secret-token-1" not in log


def test_an_early_stop_is_a_success_with_its_own_reason(tmp_path: Path) -> None:
    """The report says so, and which step the result is of."""
    report = run(tmp_path, "early stop")
    assert (report.exit_code, report.reason, report.message) == (0, "EarlyStopped", "stopped early at step 4 of 10")
    assert (report.step, report.total_steps) == (4, 10)
    assert report.evaluation is not None
    assert report.evaluation.document() == {"base": 2.5, "tuned": 1.25, "improvement": 1.25, "bestStep": 2}
