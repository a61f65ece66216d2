"""`tunewright chat`: what a URI leads to, where an adapter's base comes from, and how the conversation goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer
from tests.trainer.kit import MODEL_FILES
from tests.unit.cli.conftest import Run
from tunewright_api.run_config import HubSettings, StorageSettings
from tunewright_cli import chat
from tunewright_trainer.publish import Result, publish
from tunewright_trainer.storage import Storage

KEY, WRITER = "0123456789abcdef", "0a1b2c3d"


@dataclass
class Echo:
    """A model that says how many turns it saw and what the last one was."""

    has_chat_template: bool = True
    description: str = "stub"
    loaded: list[tuple[Path, Path | None]] = field(default_factory=list)
    heard: list[list[dict[str, str]]] = field(default_factory=list)
    settings: list[tuple[int, float]] = field(default_factory=list)

    def answer(
        self, turns: Sequence[dict[str, str]], *, max_tokens: int, temperature: float, say: Callable[[str], None]
    ) -> str:
        """Answer in two pieces."""
        self.heard.append(list(turns))
        self.settings.append((max_tokens, temperature))
        pieces = [f"{len(turns)}: ", turns[-1]["content"].upper()]
        for piece in pieces:
            say(piece)
        return "".join(pieces)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    """Takes the place of a loaded model."""
    speaker = Echo()

    def load(model: Path, adapter: Path | None, device: str, name: str) -> Echo:
        speaker.loaded.append((model, adapter))
        return speaker

    monkeypatch.setattr(chat, "load", load)
    return speaker


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files of a whole model."""
    return make_model(tmp_path / "model")


def make_model(folder: Path, **config: Any) -> Path:
    """Write files of a model."""
    folder.mkdir(parents=True)
    for name, content in MODEL_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def adapter_files(base: str | None, **config: Any) -> dict[str, bytes]:
    """Return files of an adapter."""
    document = {"peft_type": "LORA", "base_model_name_or_path": base, **config}
    return {"adapter_config.json": json.dumps(document).encode(), "adapter_model.safetensors": b"weights"}


def make_adapter(folder: Path, base: str | None, **config: Any) -> Path:
    """Write files of an adapter."""
    folder.mkdir(parents=True)
    for name, content in adapter_files(base, **config).items():
        (folder / name).write_bytes(content)
    return folder


def published(work: Path, output: Path, adapter: Path, model_input: dict[str, str] | None) -> Path:
    """Publish an adapter, with a run.json that names its base model."""
    files = {f"adapter/{path.name}": path for path in adapter.iterdir()}
    if model_input is not None:
        (work / "run.json").write_text(json.dumps({"inputs": {"model": model_input}}))
        files["run.json"] = work / "run.json"
    publish(Storage(StorageSettings(), local=True), str(output), Result(KEY, WRITER, "Adapter", "adapter", files, {}))
    return output


def test_prompts_are_answered_one_by_one(run: Run, echo: Echo, model: Path) -> None:
    """Each by itself, to stdout and nothing else there, with the options that were given."""
    result = run("chat", model, "--prompt", "a", "--prompt", "b", "--max-tokens", "5", "--temperature", "0.5")
    assert (result.exit_code, result.stdout) == (0, "1: A\n1: B\n")
    assert echo.loaded == [(model, None)]
    assert echo.settings == [(5, 0.5)] * 2
    assert f"{model} is loaded (stub)" in result.stderr


def test_lines_make_a_conversation(run: Run, echo: Echo, model: Path) -> None:
    """Turns and answers are remembered, after the system prompt; empty lines say nothing."""
    result = run("chat", model, "--system", "be brief", stdin="one\n\n two\n")
    assert result.stdout == "2: ONE\n4:  TWO\n"
    assert [(turn["role"], turn["content"]) for turn in echo.heard[-1]] == [
        ("system", "be brief"), ("user", "one"), ("assistant", "2: ONE"), ("user", " two")
    ]  # fmt: skip
    assert echo.settings[0] == (256, 0.0)


def test_without_a_chat_template_lines_are_continued(run: Run, echo: Echo, model: Path) -> None:
    """Nothing tells turns apart, so none is remembered, and there is no place for a system prompt."""
    echo.has_chat_template = False
    assert run("chat", model, stdin="one\ntwo\n").stdout == "1: ONE\n1: TWO\n"
    result = run("chat", model, "--system", "be brief", "--prompt", "a")
    assert (result.exit_code, "--system: the model has no chat template" in result.stderr) == (20, True)


def test_paths_need_no_prefix(run: Run, echo: Echo, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no scheme is a path."""
    monkeypatch.chdir(model.parent)
    assert run("chat", "model", "--prompt", "a").exit_code == 0
    assert echo.loaded == [(model, None)]


@pytest.mark.parametrize("below", ["", KEY, f"{KEY}/manifest.json", f"{KEY}/{WRITER}/adapter"])
def test_a_published_adapter_finds_its_base(run: Run, echo: Echo, model: Path, tmp_path: Path, below: str) -> None:
    """From output folder, run folder, manifest or adapter: run.json says what it was trained on."""
    adapter = make_adapter(tmp_path / "adapter", "elsewhere/model")
    output = published(tmp_path, tmp_path / "out", adapter, {"uri": str(model), "version": "sha256:0"})
    result = run("chat", output / below, "--prompt", "a")
    assert result.exit_code == 0, result.output
    assert echo.loaded == [(model, output / KEY / WRITER / "adapter")]
    assert f"on {model}\n" in result.stderr


def test_an_adapter_without_a_run_names_its_base_itself(run: Run, echo: Echo, model: Path, tmp_path: Path) -> None:
    """adapter_config.json is asked where there is no run.json, published or not."""
    adapter = make_adapter(tmp_path / "adapter", str(model))
    output = published(tmp_path, tmp_path / "out", adapter, None)
    for place in (adapter, output):
        assert run("chat", place, "--prompt", "a").exit_code == 0
    assert echo.loaded == [(model, adapter), (model, output / KEY / WRITER / "adapter")]


def test_a_published_model_is_taken_whole(run: Run, echo: Echo, model: Path, tmp_path: Path) -> None:
    """Merged models and those of full fine-tuning need no base."""
    files = {f"merged/{path.name}": path for path in model.iterdir()}
    result = Result(KEY, WRITER, "Model", "merged", files, {})
    publish(Storage(StorageSettings(), local=True), str(tmp_path / "out"), result)
    assert run("chat", tmp_path / "out", "--prompt", "a").exit_code == 0
    assert echo.loaded == [(tmp_path / "out" / KEY / WRITER / "merged", None)]


def test_another_base_can_be_given(run: Run, echo: Echo, model: Path, tmp_path: Path) -> None:
    """A copy that is at hand takes the place of the base that is not; a whole model has none."""
    adapter = make_adapter(tmp_path / "adapter", "pvc://models/base")
    refused = run("chat", adapter, "--prompt", "a")
    assert refused.exit_code == 20
    assert "the adapter's base model: pvc://models/base is neither" in refused.stderr
    assert "Say with --base where it is" in refused.stderr
    assert run("chat", adapter, "--base", model, "--prompt", "a").exit_code == 0
    assert echo.loaded == [(model, adapter)]
    assert "--base is for adapters" in run("chat", model, "--base", model, "--prompt", "a").stderr
    assert "is an adapter, no base model" in run("chat", adapter, "--base", adapter, "--prompt", "a").stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "adapter_config.json names no base model: give it as --base"),
        ({"task_type": "SEQ_CLS"}, "a classifier or a reward model"),
    ],
)
def test_adapters_that_cannot_speak(
    run: Run, echo: Echo, model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Said before anything is loaded."""
    adapter = make_adapter(tmp_path / "adapter", **{"base": str(model), **change})
    result = run("chat", adapter, "--prompt", "a")
    assert (result.exit_code, message in result.stderr, echo.loaded) == (20, True, [])


def test_what_is_no_model_is_explained(run: Run, echo: Echo, model: Path, tmp_path: Path) -> None:
    """With what is there instead, and what would be right."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickled" / "adapter_model.bin").write_text("a pickle")
    head = make_model(tmp_path / "head", architectures=["LlamaForSequenceClassification"])
    for arguments, message in (
        ([folder], "is neither a model (config.json) nor an adapter"),
        ([folder], "there is notes.txt"),
        ([tmp_path / "nowhere"], "there is nothing"),
        ([head], "a classifier or a reward model"),
        ([model, "--revision", "main"], "--revision is for models on the hub"),
        (["ftp://models/x"], "use s3://bucket/key"),
    ):
        result = run("chat", *arguments, "--prompt", "a")
        assert (result.exit_code, message in result.stderr) == (20, True), result.stderr
    assert echo.loaded == []


def test_models_and_adapters_on_the_hub(run: Run, echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's base is fetched from the hub too, both into the hub client's cache, for the next look."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer.start() as server:
        monkeypatch.setattr(chat, "HubSettings", lambda: HubSettings(endpoint=server.endpoint))
        base = server.add("model", "org/base", MODEL_FILES).branches["main"][0]
        files = {**adapter_files("org/base", revision=base.oid), "adapter_model.bin": b"a pickle"}
        server.add("model", "org/tuned", files)
        result = run("chat", "hf://org/tuned", "--prompt", "a")
        assert result.exit_code == 0, result.output
    ((base_path, adapter_path),) = echo.loaded
    assert adapter_path is not None
    assert {path.name for path in adapter_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (base_path.name, base_path.is_relative_to(tmp_path / "cache")) == (base.oid, True)
    assert not (base_path / "pytorch_model.bin").exists()
    assert f"on hf://org/base at {base.oid}" in result.stderr
