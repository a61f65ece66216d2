"""Models and data sets from a hub: the real client against a stand-in of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub_server import Fault, HubServer, User
from tunewright_api.run_config import HubSettings
from tunewright_api.v1alpha1.parts import DataSource
from tunewright_trainer import hub
from tunewright_trainer.errors import (
    AccessDenied,
    HubUnavailable,
    InvalidConfiguration,
    MissingFile,
    MissingModel,
    TrainerError,
)
from tunewright_trainer.transfer import Stop, ignore

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"tensors", "evil.bin": b"pickle"}
SECRET = "hf-token"
ROWS = b'{"text": "a"}\n'
SPLIT = {
    "README.md": b"---\nconfigs:\n- config_name: a\n  data_files: [{split: test, path: 'rows/*'}]\n---\n",
    "rows/2.jsonl": ROWS * 2,
    "rows/1.jsonl": ROWS,
    "train.jsonl": ROWS,
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with public, private and gated repositories; no token yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer.start() as running:
        running.add("model", "org/model", FILES)
        running.add("model", "org/private", FILES, private=True)
        running.add("model", "org/gated", FILES, gated=True)
        running.add("dataset", "org/rows", {"README.md": b"#", "data/train.jsonl": ROWS})
        running.add("dataset", "org/split", SPLIT)
        running.add("dataset", "org/secret", {"train.jsonl": ROWS}, private=True)
        running.tokens["hf_member"] = User("alice", ("org",))
        running.tokens["hf_stranger"] = User("bob")
        yield running


def settings(server: HubServer, secret_name: str | None = SECRET) -> HubSettings:
    """Return settings for the server."""
    return HubSettings(endpoint=server.endpoint, secret_name=secret_name)


def test_a_model_is_pinned_and_fetched(server: HubServer, tmp_path: Path) -> None:
    """The revision becomes a commit, and only the files that were chosen are fetched."""
    model = hub.resolve("model", "org/model", None, settings(server), Stop())
    commit = server.repositories["model", "org/model"].branches["main"][0].oid
    assert (model.repository, model.commit) == ("org/model", commit)
    assert {file.name: file.size_bytes for file in model.files} == {n: len(c) for n, c in FILES.items()}
    chosen = ["config.json", "model.safetensors"]
    hub.download(model, chosen, tmp_path / "model", settings(server), Stop(), ignore)
    fetched = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    assert fetched == {name: FILES[name] for name in chosen}
    assert not server.sent("evil.bin")


@pytest.mark.parametrize("name", ["private", "gated"])
def test_a_token_opens_private_and_gated_models(
    server: HubServer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token comes from HF_TOKEN, where the pod has it from the Secret."""
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    model = hub.resolve("model", f"org/{name}", None, settings(server), Stop())
    hub.download(model, ["config.json"], tmp_path / "model", settings(server), Stop(), ignore)
    assert (tmp_path / "model/config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize(
    ("name", "token", "error", "message"),
    [
        (
            "gone",
            None,
            MissingModel,
            "hf://org/gone: the hub has no such model, or it is private: check the name, or put",
        ),
        (
            "private",
            None,
            MissingModel,
            "hf://org/private: the hub has no such model, or it is private: check the name",
        ),
        (
            "private",
            "hf_stranger",
            MissingModel,
            "hf://org/private: the hub has no such model, or the token may not read it: check the name, or put a token "
            "with access under the key `token` of Secret hf-token",
        ),
        ("gated", None, AccessDenied, "hf://org/gated is gated: accept its terms on the hub, then put a token"),
        (
            "model",
            "hf_expired",
            AccessDenied,
            "hf://org/model: the hub answered 401 (Invalid credentials in Authorization header): put a token",
        ),
        ("model", None, MissingModel, "hf://org/model: the repository has no revision 'v1': set the model's revision"),
        ("bad--name", None, InvalidConfiguration, "hf://org/bad--name: Cannot have -- or .."),
    ],
)
def test_a_refusal_is_explained(
    server: HubServer,
    name: str,
    token: str | None,
    error: type[TrainerError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the hub refuses is told with what to do."""
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error) as caught:
        hub.resolve("model", f"org/{name}", "v1", settings(server), Stop(), retry_seconds=0.1)
    assert str(caught.value).startswith(message)
    assert token is None or token not in str(caught.value)


def test_without_a_secret_the_message_says_where_to_name_one(server: HubServer) -> None:
    """There is no Secret whose key could be wrong."""
    with pytest.raises(AccessDenied, match=r"name a Secret with an access token \(key `token`\) in hub.secretName"):
        hub.resolve("model", "org/gated", None, settings(server, None), Stop())


@pytest.mark.parametrize("status", [429, 503, None])
def test_a_hub_that_answers_later_is_waited_for(server: HubServer, status: int | None) -> None:
    """Too many requests, an outage and a broken connection pass; after the time allowed they are an outage."""
    server.faults.append(Fault("GET", "/api/models/org/model", status))
    assert hub.resolve("model", "org/model", None, settings(server), Stop()).commit
    server.faults.append(Fault("GET", "/api/models/org/model", status, times=9))
    with pytest.raises(HubUnavailable, match=r"hf://org/model: .*, all retries included"):
        hub.resolve("model", "org/model", None, settings(server), Stop(), retry_seconds=0.1)


@pytest.mark.usefixtures("server")
def test_no_connection_is_an_outage() -> None:
    """A hub that cannot be reached is no mistake of the user."""
    unreachable = HubSettings(endpoint="http://127.0.0.1:1")
    with pytest.raises(HubUnavailable, match="no connection to the hub"):
        hub.resolve("model", "org/model", None, unreachable, Stop(), retry_seconds=0.1)


def test_a_download_that_breaks_off_is_no_model(server: HubServer, tmp_path: Path) -> None:
    """The client takes an unfinished folder for the model when the listing fails; the trainer does not."""
    model = hub.resolve("model", "org/model", None, settings(server), Stop())
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    server.faults.append(Fault("GET", "/tree/", 400))
    with pytest.raises(HubUnavailable):
        hub.download(model, list(FILES), tmp_path, settings(server), Stop(), ignore, retry_seconds=0.1)


def test_a_file_of_a_data_set_is_pinned_and_fetched(server: HubServer, tmp_path: Path) -> None:
    """Its version is the commit, so that the run key has it."""
    uri = "hf://datasets/org/rows/data/train.jsonl"
    (file,) = hub.find_data(DataSource(uri=uri, revision="main"), settings(server), Stop())
    commit = server.repositories["dataset", "org/rows"].branches["main"][0].oid
    assert (file.name, file.size_bytes, file.version) == ("data/train.jsonl", len(ROWS), commit)
    snapshot = hub.HubSnapshot("dataset", "org/rows", commit)
    hub.download(snapshot, ["data/train.jsonl"], tmp_path, settings(server), Stop(), ignore)
    assert (tmp_path / "data/train.jsonl").read_bytes() == ROWS


def test_a_split_is_pinned_and_only_its_files_are_described(server: HubServer) -> None:
    """The README of that commit says which files they are; the rows themselves are not fetched yet."""
    source = DataSource(uri="hf://datasets/org/split", split="test", revision="main")
    files = hub.find_data(source, settings(server), Stop())
    commit = server.repositories["dataset", "org/split"].branches["main"][0].oid
    assert [(f.name, f.size_bytes) for f in files] == [("rows/1.jsonl", len(ROWS)), ("rows/2.jsonl", 2 * len(ROWS))]
    assert {file.version for file in files} == {commit}
    assert {request for request in server.sent("/resolve/") if not request.endswith("README.md")} == set()


def test_the_split_of_a_data_set_without_a_readme_is_train(server: HubServer) -> None:
    """Where nothing is said."""
    server.add("dataset", "org/bare", {"train.csv": b"text\na\n", "test.csv": b"text\nb\n"})
    (file,) = hub.find_data(DataSource(uri="hf://datasets/org/bare"), settings(server), Stop())
    assert file.name == "train.csv"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"uri": "hf://datasets/org/rows/train.jsonl"},
            r"has no file 'train.jsonl' at commit [0-9a-f]{12}; its files: README.md, data/train",
        ),
        ({"uri": "hf://datasets/org/secret/train.jsonl"}, "hf://datasets/org/secret: the hub has no such data set, or"),
        ({"uri": "hf://datasets/org/rows/data/train.jsonl", "revision": "v9"}, "no revision 'v9': set the data source"),
        ({"uri": "hf://datasets/org/split"}, "hf://datasets/org/split: .* no split 'train': set split to one of test"),
    ],
)
def test_missing_data_is_explained(server: HubServer, source: dict[str, str], message: str) -> None:
    """Data set, file, revision or split."""
    with pytest.raises(MissingFile, match=message):
        hub.find_data(DataSource.model_validate(source), settings(server), Stop())


def test_errors_of_xet_and_of_upload_threads() -> None:
    """Xet's connection errors are an outage; a fault of the client's own, wrapped by its threads, is not."""
    subject = hub.Subject("hf://org/name", "model", None, "model.revision", MissingModel)

    def break_off() -> None:
        raise ConnectionError("Network error: 503")

    with pytest.raises(HubUnavailable, match=r"no connection to the hub \(ConnectionError: Network error: 503\), all"):
        hub.retried(subject, HubSettings(), Stop(), break_off, retry_seconds=0.1)

    def fail() -> None:
        raise RuntimeError("Error while uploading 'x'") from ValueError("Malformed response")

    with pytest.raises(RuntimeError, match="Error while uploading"):
        hub.retried(subject, HubSettings(), Stop(), fail, retry_seconds=0.1)
