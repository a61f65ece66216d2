"""The adapter that a run goes on from, as the supervisor finds, judges and fetches it; a worker only plays training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.kit import MODEL_FILES, ROWS, make_run, make_settings
from tunewright_api.run_config import StorageSettings, TrainRun
from tunewright_api.run_report import RunReport
from tunewright_trainer import start_adapter, supervisor
from tunewright_trainer.errors import InvalidAdapter, InvalidInput, MissingFile, fate_of
from tunewright_trainer.publish import Published, Result, publish
from tunewright_trainer.storage import Storage

KEY = "0123456789abcdef"
STORAGE = Storage(StorageSettings(), local=True)


def published(
    folder: Path, *, kind: Any = "Adapter", leave_out: str = "", outputs: list[str] | None = None, **config: Any
) -> Published:
    """Publish an adapter of the base model in `folder`; `outputs` are those of its head, `config` changes its
    configuration."""
    work = folder / "first"
    work.mkdir(parents=True)
    given = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": f"{folder}/base", **config,
    }  # fmt: skip
    files = {"adapter_config.json": json.dumps(given), "adapter_model.safetensors": "weights"}
    paths = {}
    for name, text in files.items():
        if name != leave_out:
            (work / name).write_text(text)
            paths[f"adapter/{name}"] = work / name
    paths["run.json"] = work / "run.json"
    paths["run.json"].write_text(json.dumps({} if outputs is None else {"outputs": outputs}))
    made, _ = publish(STORAGE, f"{folder}/results", Result(KEY, "0a1b2c3d", kind, "adapter", paths, {}))
    return made


def run_of(folder: Path, below: str = "", **spec: Any) -> TrainRun:
    """Return a run that goes on from what was published."""
    base = spec.pop("base", f"{folder}/base")
    return make_run(
        None,
        local=True,
        **{
            "model": {"uri": base, "continueFrom": {"uri": f"{folder}/results{below}"}},
            "dataset": {"train": [{"uri": f"{folder}/train.jsonl"}]},
            "output": {"uri": f"{folder}/out"},
            **spec,
        },
    )


@pytest.mark.parametrize("below", ["", f"/{KEY}", f"/{KEY}/manifest.json", f"/{KEY}/0a1b2c3d/adapter"])
def test_an_adapter_is_found_from_every_place(below: str, tmp_path: Path) -> None:
    """Every address that get-adapter takes leads to the same manifest, digest and bytes."""
    made = published(tmp_path)
    found = start_adapter.find(run_of(tmp_path, below), STORAGE)
    assert found is not None
    assert (found.manifest_uri, found.digest) == (made.output.manifest_uri, made.output.digest)
    assert found.warning is None
    folder = start_adapter.fetch(found, STORAGE, tmp_path / "got", lambda _: None)
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_run_from_the_base_model() -> None:
    """Nothing is looked for where nothing is named."""
    spec: dict[str, Any] = {
        "model": {"uri": "s3://bucket/base"},
        "dataset": {"train": [{"uri": "s3://bucket/t.jsonl"}]},
    }
    assert start_adapter.find(make_run(None, **spec, output={"uri": "s3://bucket/out"}), STORAGE) is None


REWARD = {"objective": {"type": "Reward"}}
CLASSES = {"objective": {"type": "Classification"}}


def labelled(*labels: str) -> dict[str, Any]:
    """Return the objective of a classifier with these labels."""
    return {"objective": {"type": "Classification", "classification": {"labels": list(labels)}}}


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "whole model": ({"kind": "Model"}, {}, "is a whole model, not an adapter: .* as model.uri"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, {}, "kind 'PREFIX_TUNING', method.type LoRA .* 'LORA'"),
    "IA3 under LoRA": ({"peft_type": "IA3"}, {}, "set method.type to the method that made it"),
    "LoRA under IA3": ({}, {"method": {"type": "IA3"}}, "kind 'LORA', method.type IA3"),
    "reward model": (
        {"task_type": "SEQ_CLS"}, {}, "is a reward model or classifier, .*: objective SFT goes .* 'SFT', 'DPO',",
    ),
    "reward model of a language model": ({}, REWARD, "is a language model: objective Reward .* of its own kind"),
    "classifier of a language model": ({}, CLASSES, "is a language model: objective Classification .* of its own kind"),
    "reward model of a classifier": (
        {"task_type": "SEQ_CLS", "outputs": ["bad", "good"]}, REWARD,
        "a head with the outputs 'bad', 'good', objective Reward goes on from a reward model's one",
    ),
    "classifier of a reward model": (
        {"task_type": "SEQ_CLS", "outputs": ["reward"]}, CLASSES,
        "a head with the outputs 'reward', objective Classification goes on from a classifier's",
    ),
    "classifier of other labels": (
        {"task_type": "SEQ_CLS", "outputs": ["bad", "good"]}, labelled("good", "bad"),
        "outputs 'bad', 'good', .* from 'good', 'bad' .objective.classification.labels",
    ),
    "head without a record": ({"task_type": "SEQ_CLS"}, CLASSES, "a head with the outputs none"),
    "trained biases": ({"bias": "all"}, {"objective": {"type": "DPO"}}, "has trained bias terms .* objective DPO"),
    "other base": ({"base_model_name_or_path": "/models/other"}, {}, "an adapter of /models/other, model.uri is"),
    "other hub model": (
        {"base_model_name_or_path": "org/model"}, {"base": "hf://org/model-instruct"}, "an adapter of org/model, ",
    ),
    "no weights": ({"leave_out": "adapter_model.safetensors"}, {}, "names no .*/adapter_model.safetensors"),
    "no configuration": ({"leave_out": "adapter_config.json"}, {}, "names no .*/adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("made", "changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_a_run_cannot_go_on_from(
    made: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Refused as invalid input before anything large is fetched, with the field and the remedy."""
    published(tmp_path, **made)
    with pytest.raises(InvalidAdapter, match=f"^model.continueFrom: .*{message}") as caught:
        start_adapter.find(run_of(tmp_path, **changes), STORAGE)
    assert fate_of(caught.value) == (20, "InvalidAdapter")


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        ({}, {}),
        ({"bias": "all"}, {}),
        ({}, {"objective": {"type": "GRPO", "grpo": {"rewards": [{"type": "JSON"}]}}}),
        ({}, {"objective": {"type": "PPO", "ppo": {"rewards": [{"type": "JSON"}]}}}),
        ({"task_type": "SEQ_CLS", "outputs": ["reward"]}, REWARD),
        ({"task_type": "SEQ_CLS", "outputs": ["bad", "good"]}, CLASSES),
        ({"task_type": "SEQ_CLS", "outputs": ["bad", "good"]}, labelled("bad", "good")),
    ],
)
def test_what_a_run_can_go_on_from(made: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    """Adapters that write go on under each objective that writes, heads under their own; their outputs are known."""
    published(tmp_path, **made)
    found = start_adapter.find(run_of(tmp_path, **changes), STORAGE)
    assert found is not None
    assert found.outputs == (tuple(made["outputs"]) if "outputs" in made else None)


def test_nothing_is_published_there(tmp_path: Path) -> None:
    """A run that did not end has no manifest, and so no adapter."""
    with pytest.raises(MissingFile, match=r"^model.continueFrom: .*/results: no published result"):
        start_adapter.find(run_of(tmp_path), STORAGE)


def test_a_copy_of_the_base_elsewhere_is_a_warning(tmp_path: Path) -> None:
    """Names of the hub and of a folder do not tell whether two models are one."""
    published(tmp_path, base_model_name_or_path="org/model")
    found = start_adapter.find(run_of(tmp_path), STORAGE)
    assert found is not None
    assert any("warning: " in note and "copies of the same model" in note for note in found.notes)


FILES = "0a1b2c3d/adapter"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{}"),
        (f"{FILES}/adapter_model.safetensors", "weightz"),
        (f"{FILES}/adapter_model.safetensors", None),
        (f"{FILES}/adapter_config.json", "["),
        (f"{FILES}/adapter_config.json", None),
    ],
)
def test_damage_is_invalid_input(name: str, content: str | None, tmp_path: Path) -> None:
    """Manifest or files: what is missing or does not verify is named, and trying again would not help."""
    published(tmp_path)
    path = tmp_path / "results" / KEY / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInput, match=f"^model.continueFrom: .*{path.name}"):
        start_adapter.fetch(start_adapter.find(run_of(tmp_path), STORAGE), STORAGE, tmp_path / "got", lambda _: None)


def carry_out(folder: Path, run: TrainRun, behaviour: str = "succeed") -> RunReport:
    """Run with the worker that only plays training."""
    return supervisor.run(run, make_settings(folder / "work", behaviour, local=True))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with base model and rows."""
    (tmp_path / "base").mkdir()
    for name, content in MODEL_FILES.items():
        (tmp_path / "base" / name).write_bytes(content)
    (tmp_path / "train.jsonl").write_text(ROWS)
    return tmp_path


def test_a_run_goes_on_from_an_adapter(inputs: Path) -> None:
    """The worker gets the folder; report, run.json and card say where it came from; another address is the same run."""
    made = published(inputs)
    report = carry_out(inputs, run_of(inputs, f"/{KEY}"))
    assert report.exit_code == 0, report.message
    assert report.plan is not None
    assert report.plan.continued_from == made.output.manifest_uri
    task = json.loads((inputs / "work" / "task.json").read_text())
    assert task["adapterPath"] == str(inputs / "work" / "adapter")
    (own,) = (inputs / "out").glob("*/*/run.json")
    assert json.loads(own.read_text())["inputs"]["adapter"] == {
        "manifestUri": made.output.manifest_uri, "digest": made.output.digest,
    }  # fmt: skip
    assert f"from the adapter of `{made.output.manifest_uri}` on" in (own.parent / "README.md").read_text()
    again = carry_out(inputs, run_of(inputs, f"/{KEY}/manifest.json"))
    assert (again.cached, again.run_key) == (True, report.run_key)
    fresh = make_run(
        None,
        local=True,
        model={"uri": f"{inputs}/base"},
        dataset={"train": [{"uri": f"{inputs}/train.jsonl"}]},
        output={"uri": f"{inputs}/out"},
    )
    assert carry_out(inputs, fresh).run_key != report.run_key


def test_the_report_of_a_wrong_adapter(inputs: Path) -> None:
    """Exit code 20 in seconds, with nothing fetched."""
    published(inputs, base_model_name_or_path="/models/other")
    report = carry_out(inputs, run_of(inputs))
    assert (report.exit_code, report.reason) == (20, "InvalidAdapter")
    assert "so set model.uri to that" in report.message
    assert not (inputs / "work" / "data").exists()
