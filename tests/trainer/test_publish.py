"""Publishing and downloading: the manifest comes last, one writer wins, nothing damaged is handed out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.kit import Bucket, safetensors
from tests.trainer.s3_fixtures import bucket, server, shared_bucket, storage
from tunewright_api.run_config import StorageSettings
from tunewright_trainer.artifact import download_artifact
from tunewright_trainer.errors import CorruptArtifact, MissingFile, StorageUnavailable
from tunewright_trainer.publish import Published, Result, find_published, is_publishable, output_files, publish
from tunewright_trainer.storage import Storage, join

__all__ = ["bucket", "server", "shared_bucket", "storage"]

KEY = "0123456789abcdef"
FILES = {"adapter/adapter_model.safetensors": safetensors(64), "adapter/adapter_config.json": b"{}", "run.json": b"{}"}


class Place:
    """An output folder of either kind, with what a test does to it behind the trainer's back."""

    def __init__(self, storage: Storage, uri: str, bucket: Bucket | None, folder: Path) -> None:
        self.storage = storage
        self.uri = uri
        self._bucket = bucket
        self._folder = folder

    def names(self) -> list[str]:
        """Return all files below the output folder."""
        return [file.name for file in self.storage.listing(self.uri)]

    def write(self, name: str, content: bytes) -> None:
        """Overwrite a file."""
        self.storage.put(join(self.uri, name), content, replaces="*")

    def remove(self, name: str) -> None:
        """Take a file away."""
        if self._bucket is None:
            (self._folder / name).unlink()
        else:
            self._bucket.client.delete_object(Bucket=self._bucket.name, Key=f"out/{name}")

    def json(self, name: str) -> Any:
        """Read a JSON file."""
        stored = self.storage.read(join(self.uri, name), 1_000_000)
        assert stored is not None
        return json.loads(stored[0])


@pytest.fixture(params=["s3", "pvc"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty output folder, in S3 and on a mounted volume."""
    if request.param == "pvc":
        volume = Storage(StorageSettings(), pvc_root=tmp_path / "pvc")
        return Place(volume, "pvc://claim/out", None, tmp_path / "pvc/claim/out")
    bucket: Bucket = request.getfixturevalue("bucket")
    return Place(request.getfixturevalue("storage"), f"s3://{bucket.name}/out", bucket, tmp_path)


Publish = Callable[..., tuple[Published, bool]]


@pytest.fixture
def publish_files(place: Place, tmp_path: Path) -> Publish:
    """Publishes FILES as a writer."""

    def act(writer: str = "aaaaaaaa", files: dict[str, bytes] = FILES, **changes: Any) -> tuple[Published, bool]:
        folder = tmp_path / f"output-{writer}"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        given = {"run_key": KEY, "kind": "Adapter", "root": "adapter", "metrics": {"loss": 1.5}, **changes}
        result = Result(writer=writer, files=output_files(folder), **given)
        return publish(place.storage, place.uri, result)

    return act


def test_the_layout(place: Place, publish_files: Publish) -> None:
    """Files lie in the writer's folder; manifest and latest.json name them relative to themselves."""
    published, others = publish_files()
    assert not others
    assert place.names() == [
        *(f"{KEY}/aaaaaaaa/{name}" for name in sorted(FILES)),
        f"{KEY}/manifest.json",
        "latest.json",
    ]
    manifest = place.json(f"{KEY}/manifest.json")
    assert [file["path"] for file in manifest["files"]] == [f"aaaaaaaa/{name}" for name in sorted(FILES)]
    assert (manifest["root"], manifest["metrics"]) == ("aaaaaaaa/adapter", {"loss": 1.5})
    assert place.json("latest.json")["manifest"] == f"{KEY}/manifest.json"
    assert published.output.uri == f"{place.uri}/{KEY}/aaaaaaaa/adapter"
    assert published.output.size_bytes == sum(map(len, FILES.values()))
    assert find_published(place.storage, place.uri, KEY) == published


@pytest.mark.parametrize("where", ["", f"/{KEY}", f"/{KEY}/manifest.json", f"/{KEY}/aaaaaaaa/adapter", "/"])
def test_a_download_by_any_of_its_names(place: Place, publish_files: Publish, tmp_path: Path, where: str) -> None:
    """The output folder, the run's folder, the manifest and the adapter's own folder lead to the same files."""
    publish_files()
    manifest = download_artifact(place.uri + where, tmp_path / "got", place.storage)
    assert manifest.run_key == KEY
    assert {path.name: path.read_bytes() for path in (tmp_path / "got").iterdir()} == {
        "adapter_model.safetensors": FILES["adapter/adapter_model.safetensors"],
        "adapter_config.json": b"{}",
    }


def test_nothing_is_there_without_a_manifest(place: Place, publish_files: Publish, tmp_path: Path) -> None:
    """After a crash between upload and manifest there is no result; the next writer publishes beside the remains."""
    publish_files()
    place.remove(f"{KEY}/manifest.json")
    place.remove("latest.json")
    assert find_published(place.storage, place.uri, KEY) is None
    for where in ("", f"/{KEY}", f"/{KEY}/aaaaaaaa/adapter"):
        with pytest.raises(MissingFile, match="no published result"):
            download_artifact(place.uri + where, tmp_path / "got", place.storage)
    published, others = publish_files("bbbbbbbb")
    assert (published.manifest.writer, others) == ("bbbbbbbb", False)


def test_the_second_writer_takes_the_first_ones_result(place: Place, publish_files: Publish) -> None:
    """The same run finished twice: the first manifest stands, the second writer's files go away."""
    first, _ = publish_files("aaaaaaaa")
    second, others = publish_files("bbbbbbbb")
    assert (second, others) == (first, True)
    assert not [name for name in place.names() if "bbbbbbbb" in name]


def test_many_writers_at_once(place: Place, publish_files: Publish) -> None:
    """Whoever is first, one result is valid and whole, and all report it."""
    results: list[tuple[Published, bool]] = []
    threads = [
        threading.Thread(target=lambda writer=letter * 8: results.append(publish_files(writer))) for letter in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len({published.output.digest for published, _ in results}) == 1
    assert sorted(others for _, others in results) == [False, True, True, True]
    assert find_published(place.storage, place.uri, KEY) == results[0][0]


def test_two_keys_share_an_output_folder(place: Place, publish_files: Publish) -> None:
    """Two runs with the same output publish under their own keys; latest.json names the later one."""
    other = "f" * 16
    publish_files()
    publish_files("bbbbbbbb", run_key=other)
    assert find_published(place.storage, place.uri, KEY) is not None
    assert find_published(place.storage, place.uri, other) is not None
    assert place.json("latest.json")["runKey"] == other


@pytest.mark.parametrize("damage", ["file gone", "file cut", "no manifest"])
def test_a_damaged_result_is_made_again(place: Place, publish_files: Publish, damage: str) -> None:
    """A manifest whose files are not there does not stand in the way of a good result."""
    publish_files()
    name = f"{KEY}/aaaaaaaa/adapter/adapter_model.safetensors"
    if damage == "file gone":
        place.remove(name)
    elif damage == "file cut":
        place.write(name, b"x")
    else:
        place.write(f"{KEY}/manifest.json", b"nonsense")
    with pytest.raises(CorruptArtifact):
        find_published(place.storage, place.uri, KEY)
    published, others = publish_files("bbbbbbbb")
    assert (published.manifest.writer, others) == ("bbbbbbbb", False)
    assert find_published(place.storage, place.uri, KEY) == published


def test_a_changed_file_is_not_handed_out(place: Place, publish_files: Publish, tmp_path: Path) -> None:
    """A file of the right size but other content fails its SHA-256, and nothing stays in the target."""
    publish_files()
    content = FILES["adapter/adapter_model.safetensors"]
    place.write(f"{KEY}/aaaaaaaa/adapter/adapter_model.safetensors", content[:-1] + b"x")
    with pytest.raises(CorruptArtifact, match=r"adapter_model\.safetensors: SHA-256 is "):
        download_artifact(place.uri, tmp_path / "got", place.storage)
    assert not (tmp_path / "got").exists()


def test_a_missing_or_cut_file_is_named(place: Place, publish_files: Publish, tmp_path: Path) -> None:
    """What is missing or too short is told before anything is fetched."""
    publish_files()
    place.write(f"{KEY}/aaaaaaaa/adapter/adapter_config.json", b"{} ")
    with pytest.raises(CorruptArtifact, match=r"adapter_config\.json: has 3 bytes, the manifest says 2"):
        download_artifact(place.uri, tmp_path / "got", place.storage)
    place.remove(f"{KEY}/aaaaaaaa/adapter/adapter_config.json")
    with pytest.raises(CorruptArtifact, match=r"adapter_config\.json: missing, but the manifest names it"):
        download_artifact(place.uri, tmp_path / "got", place.storage)


@pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "aaaaaaaa/adapter/../../../evil", "a\\..\\evil"])
def test_a_path_that_climbs_out_is_refused(place: Place, publish_files: Publish, tmp_path: Path, path: str) -> None:
    """A forged manifest cannot write outside the target."""
    publish_files()
    manifest = place.json(f"{KEY}/manifest.json")
    manifest["files"][0]["path"] = path
    place.write(f"{KEY}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CorruptArtifact, match="leaves the folder of the manifest"):
        download_artifact(place.uri, tmp_path / "got", place.storage)


def test_a_forged_pointer_is_refused(place: Place, publish_files: Publish, tmp_path: Path) -> None:
    """latest.json leads only into its own folder."""
    publish_files()
    pointer = {**place.json("latest.json"), "manifest": "../other/manifest.json"}
    place.write("latest.json", json.dumps(pointer).encode())
    with pytest.raises(CorruptArtifact, match="is not a manifest of this folder"):
        download_artifact(place.uri, tmp_path / "got", place.storage)


def test_a_target_with_files_is_left_alone(place: Place, publish_files: Publish, tmp_path: Path) -> None:
    """A folder in which something lies is not written into."""
    publish_files()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        download_artifact(place.uri, tmp_path, place.storage)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_upload_that_storage_lost_is_not_published(
    place: Place, publish_files: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are compared before the manifest is written."""
    monkeypatch.setattr(place.storage, "upload", lambda *_: None)
    with pytest.raises(StorageUnavailable, match="the upload is not complete"):
        publish_files()
    assert place.names() == []


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("adapter/adapter_model.safetensors", True),
        ("adapter/tokenizer.model", True),
        ("adapter/chat_template.jinja", True),
        ("logs/attempt-1.log", True),
        ("adapter/training_args.bin", False),
        ("optimizer.pt", False),
        ("model.pkl", False),
        ("code.py", False),
        ("random.model", False),
    ],
)
def test_pickles_and_code_are_never_published(name: str, published: bool) -> None:
    """Only tensors, text and tokenizer tables leave the pod."""
    assert is_publishable(name) == published
