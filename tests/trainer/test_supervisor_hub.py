"""The supervisor with a hub: inputs from it, results to it, and what happens when the push fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.hub_server import Fault, HubServer, User
from tests.trainer.kit import MODEL_FILES, ROWS, WRITER, Bucket, bucket_run, make_settings
from tests.trainer.s3_fixtures import bucket, server, shared_bucket
from tunewright_api.run_report import RunReport
from tunewright_trainer import hub_push, supervisor
from tunewright_trainer.settings import SupervisorSettings

__all__ = ["bucket", "server", "shared_bucket"]

TOKEN = "hf_secret-of-alice"
HUB_OUTPUT = {"repository": "org/bot", "revision": "v1"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a private model and a private data set, and the token for them."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer.start() as running:
        running.tokens[TOKEN] = User("alice", ("org",))
        running.add("model", "org/base", MODEL_FILES, private=True)
        running.add("dataset", "org/rows", {"data/train.jsonl": ROWS.encode()}, private=True)
        yield running


def run(bucket: Bucket, hub: HubServer, settings: SupervisorSettings, **spec: Any) -> RunReport:
    """Run on the inputs of the bucket, with a push to the hub."""
    output = {"uri": f"s3://{bucket.name}/out", "hub": HUB_OUTPUT}
    given = {"output": output, "hub": {"endpoint": hub.endpoint, "secretName": "hf-token"}, **spec}
    return supervisor.run(bucket_run(bucket, **given), settings)


def test_from_the_hub_to_the_hub(bucket: Bucket, hub: HubServer, tmp_path: Path) -> None:
    """Private model and rows are read, the result goes to S3 and to a branch; the worker never has the token."""
    rows = {"uri": "hf://datasets/org/rows/data/train.jsonl", "revision": "main"}
    settings = make_settings(tmp_path / "work", environment={"HF_TOKEN": TOKEN})
    spec = {"model": {"uri": "hf://org/base"}, "dataset": {"train": [rows]}}
    report = run(bucket, hub, settings, **spec)
    assert (report.exit_code, report.reason, report.cached) == (0, "Succeeded", False)
    commit = hub.repositories["model", "org/bot"].branches["v1"][-1]
    assert report.output is not None
    assert report.output.hub_url == f"{hub.endpoint}/org/bot/tree/{commit.oid}"
    names = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(commit.files) == names
    card = commit.files["README.md"].decode()
    data_commit = hub.repositories["dataset", "org/rows"].branches["main"][0].oid
    for text in (
        'base_model: "org/base"\ndatasets:\n- "org/rows"\n',
        'model = PeftModel.from_pretrained(model, "org/bot", revision="v1")',
        f"- `hf://datasets/org/rows/data/train.jsonl@main` ({len(ROWS)} bytes, version `{data_commit}`)",
    ):
        assert text in card
    own = f"out/{report.run_key}/{WRITER}"
    assert bucket.json(f"{own}/report.json")["output"]["hubUrl"] == report.output.hub_url
    assert bucket.json(f"{own}/run.json")["inputs"]["data"][0]["version"] == data_commit
    log = (settings.work / "logs/attempt-1.log").read_text()
    assert "leaking nothing []" in log
    assert TOKEN not in log
    hub.repositories["dataset", "org/rows"].commit("main", "more", "", {"data/train.jsonl": ROWS.encode() * 2})
    again = run(bucket, hub, make_settings(tmp_path / "again"), **spec)
    assert again.cached is False
    assert again.run_key != report.run_key


def test_a_split_is_read_file_by_file(bucket: Bucket, hub: HubServer, tmp_path: Path) -> None:
    """All rows of the split's files, in order; run.json names them, and a commit to another file is another run."""
    bucket.fill()
    lines = ROWS.splitlines(keepends=True)
    files = {
        "data/train-00000-of-00002.jsonl": "".join(lines[:2]).encode(),
        "data/train-00001-of-00002.jsonl": "".join(lines[2:]).encode(),
        "data/test-00000-of-00001.jsonl": b"broken",
    }
    hub.add("dataset", "org/shards", files)
    spec = {"dataset": {"train": [{"uri": "hf://datasets/org/shards"}]}, "output": {"uri": f"s3://{bucket.name}/out"}}
    settings = make_settings(tmp_path / "work")
    report = run(bucket, hub, settings, **spec)
    assert report.exit_code == 0
    written = (settings.work / "data/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == [json.loads(line) for line in lines]
    (data,) = bucket.json(f"out/{report.run_key}/{WRITER}/run.json")["inputs"]["data"]
    assert data["uri"] == "hf://datasets/org/shards#train"
    assert data["files"] == list(files)[:2]
    assert data["bytes"] == len(ROWS.encode())
    assert not hub.sent("test-00000")
    bad = {"dataset": {"train": [{"uri": "hf://datasets/org/shards", "split": "test"}]}}
    failed = run(bucket, hub, make_settings(tmp_path / "bad"), **{**spec, **bad})
    assert failed.reason == "InvalidData"
    assert "hf://datasets/org/shards/data/test-00000-of-00001.jsonl: line 1: not valid JSON" in failed.message


def test_a_failed_push_is_made_up_for_without_training(
    bucket: Bucket, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is in S3, so the next attempt only pushes; the one after that does not even do that."""
    bucket.fill()
    defaults = hub_push.push.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_seconds", 0.1)
    hub.faults.append(Fault("POST", "/commit/v1", 503))
    failed = run(bucket, hub, make_settings(tmp_path / "1"))
    assert (failed.exit_code, failed.reason, failed.stage) == (23, "HubUnavailable", "Publishing")
    uri = f"s3://{bucket.name}/out/{failed.run_key}/{WRITER}/adapter"
    assert failed.message == (
        "not pushed: hf://org/bot: the hub answered 503, all retries included. "
        f"The result is published at {uri}: another attempt only pushes it"
    )
    pushed = run(bucket, hub, make_settings(tmp_path / "2", "stall", writer="bbbbbbbb"))
    assert (pushed.exit_code, pushed.reason) == (0, "Cached")
    line = hub.repositories["model", "org/bot"].branches["v1"]
    assert pushed.output is not None
    assert (pushed.output.uri, pushed.output.hub_url) == (uri, f"{hub.endpoint}/org/bot/tree/{line[-1].oid}")
    stored = bucket.client.get_object(Bucket=bucket.name, Key=f"{uri.split('/', 3)[3]}/adapter_model.safetensors")
    assert line[-1].files["adapter_model.safetensors"] == stored["Body"].read()
    commits = len(line)
    third = run(bucket, hub, make_settings(tmp_path / "3", "stall"))
    assert (third.reason, third.output, len(line)) == ("Cached", pushed.output, commits)
    assert not (tmp_path / "3/published").exists()


def test_a_push_without_a_token_fails_before_training(
    bucket: Bucket, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds, not GPU hours."""
    bucket.fill()
    monkeypatch.delenv("HF_TOKEN")
    report = run(bucket, hub, make_settings(tmp_path / "work", "stall"))
    assert (report.exit_code, report.reason, report.stage) == (21, "AccessDenied", "Fetching")
    assert report.message.startswith("hf://org/bot: output.hub needs an access token")
