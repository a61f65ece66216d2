"""`tunewright watch`: what is shown, when it ends, with which code."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.unit.cli.conftest import Run
from tunewright_api.run_report import Progress
from tunewright_api.v1alpha1.status import FineTuneJobStatus, RunStatus
from tunewright_cli.errors import NotFound, Unavailable
from tunewright_cli.view import frame, sparkline, summary
from tunewright_cli.watch import PATIENCE_SECONDS, changes, exit_code, notes

TIME = "2026-01-01T00:00:00Z"


def conditions(**statuses: tuple[str, str, str]) -> list[dict[str, str]]:
    """Return conditions from (status, reason, message) by type."""
    return [
        {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": TIME}
        for kind, (status, reason, message) in statuses.items()
    ]


RUNNING = {
    "phase": "Running",
    "attempt": 1,
    "conditions": conditions(Complete=("False", "InProgress", ""), PodsReady=("True", "AllReady", "")),
    "progress": {
        "stage": "Training",
        "step": 12,
        "totalSteps": 30,
        "percent": 40.0,
        "loss": 2.5,
        "etaSeconds": 35,
        "updatedAt": TIME,
        "lossHistory": [[1, 4.0], [12, 2.5]],
    },
}
COMPLETE = {
    "phase": "Complete",
    "attempt": 1,
    "conditions": conditions(Complete=("True", "Succeeded", "")),
    "output": {
        "uri": "s3://models/x/0123456789abcdef/0a1b2c3d/adapter",
        "manifestUri": "s3://models/x/0123456789abcdef/manifest.json",
        "digest": "sha256:" + "0" * 64,
        "sizeBytes": 2_000_000,
    },
    "evaluation": {"base": 4.0, "tuned": 2.25, "improvement": 1.75},
}
FAILED = {
    "phase": "Failed",
    "attempt": 2,
    "conditions": conditions(Failed=("True", "InvalidData", "line 4,711")),
    "failure": {"reason": "InvalidData", "message": "train.jsonl: line 4,711: not valid JSON", "exitCode": 20},
}


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def follow(answers: list[dict[str, Any] | Exception]) -> tuple[Iterator[RunStatus], Clock]:
    """Return the changes that scripted answers of the API server lead to; the last answer repeats."""
    clock, remaining = Clock(), list(answers)

    def get() -> dict[str, Any]:
        answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if isinstance(answer, Exception):
            raise answer
        return {"status": answer}

    return changes(get, 2.0, clock.sleep, lambda: clock.now), clock


def test_only_changes_are_shown_and_the_end_ends_it() -> None:
    """Equal answers are not repeated; after a terminal condition nothing is asked any more."""
    looks, clock = follow([{}, {}, RUNNING, RUNNING, COMPLETE, FAILED])
    assert [status.phase for status in looks] == [None, "Running", "Complete"]
    assert clock.now == 8.0


def test_an_api_server_may_be_away_for_a_while() -> None:
    """A restart of the control plane is sat out, once it had answered."""
    looks, _ = follow([RUNNING, *[Unavailable("away")] * 100, COMPLETE])
    assert [status.phase for status in looks] == ["Running", "Complete"]


def test_an_api_server_that_stays_away_is_an_error() -> None:
    """Nobody watches for ever; one that never answered is an error at once."""
    looks, clock = follow([RUNNING, Unavailable("away")])
    with pytest.raises(Unavailable):
        list(looks)
    assert clock.now > PATIENCE_SECONDS
    with pytest.raises(Unavailable):
        list(follow([Unavailable("away")])[0])


def test_a_deleted_job_is_told_from_one_that_never_was() -> None:
    """The message says which."""
    with pytest.raises(NotFound, match="it was deleted"):
        list(follow([RUNNING, NotFound("no FineTuneJob 'x'")])[0])
    with pytest.raises(NotFound, match=r"'x'$"):
        list(follow([NotFound("no FineTuneJob 'x'")])[0])


@pytest.mark.parametrize(
    ("status", "code"),
    [(COMPLETE, 0), (FAILED, 20), ({**FAILED, "failure": {"reason": "NodeLost", "message": ""}}, 1)],
)
def test_the_exit_code_is_the_run_s(status: dict[str, Any], code: int) -> None:
    """A failure without a code of its own is a 1, never a 0."""
    assert exit_code(FineTuneJobStatus.model_validate(status)) == code


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"PodsReady": ("False", "Unschedulable", "0/3 nodes")}, ["Unschedulable: 0/3 nodes"]),
        ({"PodsReady": ("True", "AllReady", "fine")}, []),
        ({"Accepted": ("False", "InvalidSpec", "bad")}, ["InvalidSpec: bad"]),
        ({"Suspended": ("True", "UserSuspended", "")}, ["suspended: set spec.suspend to false to go on"]),
        (
            {"Failed": ("True", "NodeLost", ""), "PodsReady": ("False", "ConfigError", "no secret")},
            [],
        ),
    ],
)
def test_what_holds_the_run_up_is_said(given: dict[str, tuple[str, str, str]], expected: list[str]) -> None:
    """In the operator's words, while it is not over."""
    status = FineTuneJobStatus.model_validate({"conditions": conditions(**given)})
    assert notes(status) == expected


@pytest.mark.parametrize(
    ("losses", "drawn"),
    [([], ""), ([1.0], "▁"), ([3.0, 2.0, 1.0], "█▅▁"), ([2.0, 2.0], "▁▁"), ([1.0, 8.0], "▁█")],
)
def test_the_loss_curve_spans_all_bars(losses: list[float], drawn: str) -> None:
    """Lowest loss, lowest bar; a flat curve does not divide by zero."""
    assert sparkline(list(enumerate(losses))) == drawn


def test_a_long_history_is_thinned_to_first_and_last() -> None:
    """The curve never gets wider than asked for, and keeps both ends."""
    curve = sparkline([(step, float(100 - step)) for step in range(100)], width=10)
    assert (len(curve), curve[0], curve[-1]) == (10, "█", "▁")


def test_the_numbers_stand_in_one_line() -> None:
    """What people look for first."""
    progress = Progress.model_validate(RUNNING["progress"])
    assert summary(progress) == "Training  step 12/30  loss 2.500  0:00:35 left"


def test_the_frame_shows_bar_numbers_curve_and_notes() -> None:
    """On a terminal."""
    console = Console(width=80, record=True, force_terminal=False)
    console.print(frame("job: Running", Progress.model_validate(RUNNING["progress"]), ["Unschedulable: no GPU"]))
    text = console.export_text()
    assert "40 %" in text
    assert "█▁  loss 4.000 to 2.500" in text
    assert text.splitlines()[0] == "job: Running"
    assert text.splitlines()[-1] == "Unschedulable: no GPU"


@pytest.fixture
def api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Any], None]]:
    """A server that gives one answer after another to the real client; returns the function that queues them."""
    answers: list[tuple[int, Any]] = []
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team-a"}},
            {"name": "there", "context": {"cluster": "c", "user": "u", "namespace": "team-b"}},
        ],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield lambda status, body: answers.append((status, body))
    server.shutdown()
    server.server_close()
    assert all(path.startswith("/apis/tunewright.dev/v1alpha1/namespaces/team-") for path in paths)


def test_a_complete_job_prints_its_result(run: Run, api_server: Callable[[int, Any], None]) -> None:
    """Without a terminal: one line per change, then what there is to fetch."""
    api_server(200, {"status": RUNNING})
    api_server(200, {"status": COMPLETE})
    result = run("watch", "job", "--interval", "0.2")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "job: Running  Training  step 12/30  loss 2.500  0:00:35 left",
        "job: Complete",
        "complete         Succeeded",
        "result           s3://models/x/0123456789abcdef/0a1b2c3d/adapter",
        "manifest         s3://models/x/0123456789abcdef/manifest.json",
        "digest           sha256:" + "0" * 64,
        "size             2.0 MB",
        "validation loss  4.0000 before, 2.2500 after",
    ]


MERGED = {
    "phase": "Complete",
    "conditions": conditions(Complete=("True", "Succeeded", "merged")),
    "output": {
        "uri": "s3://models/m/0123456789abcdef/0a1b2c3d/merged",
        "manifestUri": "s3://models/m/0123456789abcdef/manifest.json",
        "digest": "sha256:" + "0" * 64,
        "sizeBytes": 3_000_000,
        "ggufUris": ["s3://models/m/0123456789abcdef/0a1b2c3d/gguf/Q8_0.gguf"],
    },
    "verification": {
        "passed": True, "adapterTensors": 4, "changedTensors": 2, "copiedTensors": 1, "prompts": 3,
        "maxDivergence": 0.01, "allowedDivergence": 0.05, "effect": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["am/bot", "adaptermerge/bot", "AdapterMerge/bot", "adaptermerges.tunewright.dev/bot"])
def test_a_merge_is_named_with_its_kind(run: Run, api_server: Callable[[int, Any], None], name: str) -> None:
    """As kubectl takes it; at the end stand the files and what was proved of them."""
    api_server(200, {"status": MERGED})
    result = run("watch", name)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "bot: Complete"
    assert "gguf             s3://models/m/0123456789abcdef/0a1b2c3d/gguf/Q8_0.gguf" in result.stdout
    assert (
        "verified         4 tensors of the adapter used, 2 of the model changed, 1 copied byte for byte"
        in result.stdout
    )


def test_a_merge_for_scripts(run: Run, api_server: Callable[[int, Any], None]) -> None:
    """The verification is in the JSON."""
    api_server(200, {"status": MERGED})
    report = json.loads(run("watch", "am/bot", "--output", "json").stdout)
    assert report["verification"]["maxDivergence"] == 0.01


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("am/bot", 1, "no AdapterMerge 'bot' in namespace 'team-a'"),
        ("finetunejob/bot", 1, "no FineTuneJob 'bot' in namespace 'team-a'"),
        ("job/bot", 20, "'job' is not a kind: use one of finetunejob/bot, adaptermerge/bot"),
    ],
)
def test_what_is_not_there_is_called_by_its_kind(
    run: Run, api_server: Callable[[int, Any], None], name: str, code: int, message: str
) -> None:
    """A wrong kind is told from a wrong name."""
    api_server(404, {"message": "not found"})
    result = run("watch", name)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_a_result_is_fetched_by_the_name_of_its_merge(
    run: Run, api_server: Callable[[int, Any], None], tmp_path: Path
) -> None:
    """One without a result says how far it is; storage comes from the AdapterMerge's own spec."""
    api_server(200, {"status": {"phase": "Running"}})
    result = run("get-adapter", "am/bot", tmp_path / "model")
    assert (result.exit_code, "AdapterMerge 'bot' has no result: it is Running" in result.stderr) == (1, True)


def test_json_is_one_line_per_change(run: Run, api_server: Callable[[int, Any], None]) -> None:
    """For scripts: phase, progress and failure, conditions by type."""
    api_server(200, {"status": RUNNING})
    api_server(200, {"status": FAILED})
    result = run("watch", "job", "--interval", "0.2", "--output", "json")
    assert result.exit_code == 20
    first, last = (json.loads(text) for text in result.stdout.splitlines())
    assert (first["phase"], first["progress"]["step"]) == ("Running", 12)
    assert last["failure"]["reason"] == "InvalidData"
    assert last["conditions"]["Failed"] == {"status": "True", "reason": "InvalidData", "message": "line 4,711"}


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (404, {"message": "not found"}, 1, "no FineTuneJob 'job' in namespace 'team-b'"),
        (404, "404 page not found\n", 1, "install the chart"),
        (401, {}, 21, "log in again"),
        (403, {}, 21, "no right to get finetunejobs in namespace 'team-b'"),
        (503, {}, 23, "answers 503"),
    ],
)
def test_a_cluster_that_says_no_is_explained(
    run: Run, api_server: Callable[[int, Any], None], status: int, body: Any, code: int, message: str
) -> None:
    """One line, with the namespace of the chosen context, and an exit code per cause."""
    api_server(status, body)
    result = run("watch", "job", "--context", "there")
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_a_missing_kubeconfig_is_explained(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback where kubectl is not set up."""
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    result = run("watch", "job")
    assert (result.exit_code, "set KUBECONFIG" in result.stderr) == (20, True)
