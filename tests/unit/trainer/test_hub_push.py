"""Results pushed to a hub: the real client against a stand-in of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub_server import PART_BYTES, Fault, HubServer, User
from tests.unit.api.builders import spec
from tunewright_api.manifest import Manifest
from tunewright_api.run_config import StorageSettings, TrainRun, build_train_run
from tunewright_api.run_report import PublishedOutput
from tunewright_trainer import hub_push
from tunewright_trainer.errors import AccessDenied, HubUnavailable, InvalidConfiguration, TrainerError
from tunewright_trainer.publish import Published
from tunewright_trainer.transfer import Stop

WEIGHTS = bytes(range(256)) * 10
CARD = """---
library_name: peft
---
```python
model = PeftModel.from_pretrained(model, "PATH/TO/THIS/FOLDER")
```
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub, and the token of one who may write to org."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    with HubServer.start() as running:
        running.tokens["hf_writer"] = User("alice", ("org",))
        running.tokens["hf_reader"] = User("alice", ("org",), writes=False)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter: two files that go up by LFS, one of them in parts, and two small ones."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "head.safetensors").write_bytes(b"small")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text(CARD)
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    return folder


def make_run(server: HubServer, **hub: object) -> TrainRun:
    """Build a run that pushes to org/bot."""
    output = {"uri": "s3://bucket/output", "hub": {"repository": "org/bot", **hub}}
    given = spec(output=output, hub={"endpoint": server.endpoint, "secretName": "hf-token"})
    return build_train_run(given, name="bot", namespace="ml", attempt=1, storage=StorageSettings())


def make_published(digit: str = "1") -> Published:
    """Build a published result."""
    uri = f"s3://bucket/output/{digit * 16}"
    manifest = Manifest(
        kind="Adapter", run_key=digit * 16, writer="0a1b2c3d", root="0a1b2c3d/adapter", created_at="", files=[]
    )
    digest = f"sha256:{digit * 64}"
    output = PublishedOutput(uri=f"{uri}/adapter", manifest_uri=f"{uri}/manifest.json", digest=digest, size_bytes=1)
    return Published(manifest, output)


def push(server: HubServer, folder: Path, digit: str = "1", seconds: float = 5.0, **hub: object) -> str:
    """Push a result."""
    run = make_run(server, **hub)
    return hub_push.push(run, make_published(digit), lambda: folder, Stop(), lambda _: None, retry_seconds=seconds)


def test_a_result_becomes_a_commit(server: HubServer, folder: Path) -> None:
    """The repository is created as private; the card's code loads the result from it; pickles stay here."""
    url = push(server, folder)
    repository = server.repositories["model", "org/bot"]
    assert repository.private
    commit = repository.branches["main"][-1]
    assert url == f"{server.endpoint}/org/bot/tree/{commit.oid}"
    assert commit.title == f"Publish bot (run {'1' * 16})"
    assert commit.files == {
        ".gitattributes": b"",
        "adapter_model.safetensors": WEIGHTS,
        "head.safetensors": b"small",
        "adapter_config.json": b"{}",
        "README.md": CARD.replace("PATH/TO/THIS/FOLDER", "org/bot").encode(),
    }


def test_repository_branch_and_title_are_the_user_s(server: HubServer, folder: Path) -> None:
    """A branch that is not there is made, and main stays as it was."""
    push(server, folder, private=False, revision="release/v1", commitMessage="Third try")
    repository = server.repositories["model", "org/bot"]
    assert not repository.private
    assert len(repository.branches["main"]) == 1
    commit = repository.branches["release/v1"][-1]
    assert commit.title == "Third try"
    assert b'from_pretrained(model, "org/bot", revision="release/v1")' in commit.files["README.md"]


def test_a_result_is_pushed_once(server: HubServer, folder: Path) -> None:
    """The second time nothing is fetched or sent, even if others have committed since."""
    first = push(server, folder)
    server.repositories["model", "org/bot"].commit("main", "by hand", "", {"LICENSE": b""})
    server.requests.clear()
    assert push(server, Path("/nonexistent")) == first
    assert not server.sent("POST /api/models/org/bot/commit")
    assert not server.sent("PUT")


def test_another_result_takes_the_place_of_the_first(server: HubServer, folder: Path) -> None:
    """Weights that only the first had go away; what people put there stays."""
    push(server, folder)
    repository = server.repositories["model", "org/bot"]
    repository.commit("main", "by hand", "", {**repository.branches["main"][-1].files, "LICENSE": b"MIT"})
    (folder / "head.safetensors").unlink()
    push(server, folder, "2")
    names = {".gitattributes", "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(repository.branches["main"][-1].files) == names


@pytest.mark.parametrize("status", [500, 429, None])
def test_a_broken_upload_goes_on_with_the_part_that_is_missing(
    server: HubServer, folder: Path, status: int | None
) -> None:
    """Of three parts the second fails once: it alone is sent twice."""
    server.faults.append(Fault("PUT", "/2", status))
    push(server, folder)
    parts = [request.rpartition("/")[2] for request in server.sent("PUT /lfs/") if request.count("/") == 3]
    assert parts == ["1", "2", "2", "3"]
    assert len(WEIGHTS) == 2560
    assert PART_BYTES == 1000
    assert server.repositories["model", "org/bot"].branches["main"][-1].files["adapter_model.safetensors"] == WEIGHTS


def test_the_next_attempt_does_not_send_what_is_there(server: HubServer, folder: Path) -> None:
    """All files were up when the commit failed for good: the next attempt only commits."""
    server.faults.append(Fault("POST", "/commit/main", 503, times=9))
    with pytest.raises(HubUnavailable) as caught:
        push(server, folder, seconds=0.1)
    assert str(caught.value) == (
        "not pushed: hf://org/bot: the hub answered 503, all retries included. The result is published at "
        f"s3://bucket/output/{'1' * 16}/adapter: another attempt only pushes it"
    )
    server.faults.clear()
    server.requests.clear()
    push(server, folder)
    assert not server.sent("PUT")
    assert len(server.repositories["model", "org/bot"].branches["main"]) == 2


def test_a_file_that_broke_off_is_sent_by_the_next_attempt(server: HubServer, folder: Path) -> None:
    """The storage refuses a part: the file that was complete is not sent again, the other is."""
    server.faults.append(Fault("PUT", "/2", 400))
    with pytest.raises(InvalidConfiguration, match="the hub answered 400"):
        push(server, folder)
    server.requests.clear()
    push(server, folder)
    assert [request.rpartition("/")[2] for request in server.sent("PUT /lfs/")] == ["1", "2", "3"]


@pytest.mark.parametrize("status", [502, None])
def test_a_commit_whose_answer_got_lost_is_not_made_twice(server: HubServer, folder: Path, status: int | None) -> None:
    """The commit was made, the answer is an error: the retry finds it."""
    server.faults.append(Fault("POST", "/commit/main", status, after=True))
    url = push(server, folder)
    line = server.repositories["model", "org/bot"].branches["main"]
    assert len(line) == 2
    assert url.endswith(line[-1].oid)


@pytest.mark.parametrize(
    ("token", "repository", "error", "message"),
    [
        (None, "org/bot", AccessDenied, "hf://org/bot: output.hub needs an access token (key `token`), and Secret hf-"),
        ("hf_expired", "org/bot", AccessDenied, "hf://org/bot: the hub answered 401 (Invalid credentials in Author"),
        ("hf_reader", "org/there", AccessDenied, "hf://org/there: the hub answered 403 (you have no rights to write"),
        (
            "hf_writer",
            "other/bot",
            AccessDenied,
            "hf://other/bot: the repository is not there, and the token's owner alice cannot create it under other: "
            "use one of alice, org, or another token",
        ),
    ],
)
def test_a_token_that_may_not_write_is_seen_before_training(
    server: HubServer,
    token: str | None,
    repository: str,
    error: type[TrainerError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No token, no valid one, no right to write, no right to create."""
    server.add("model", "org/there", {})
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error) as caught:
        hub_push.check(make_run(server, repository=repository), Stop())
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("repository", ["org/there", "org/new", "alice/new"])
def test_a_token_that_may_write_passes(server: HubServer, repository: str) -> None:
    """Into a repository that is there, or one to be created; nothing is created yet."""
    server.add("model", "org/there", {})
    hub_push.check(make_run(server, repository=repository), Stop())
    assert set(server.repositories) == {("model", "org/there")}


def test_a_token_without_the_right_is_refused(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right may have gone since the check; the message says that the result is safe."""
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(AccessDenied, match=r"not pushed: .* 403 \(you have no rights .* is published at s3://bucket"):
        push(server, folder)
