"""Published reward models: found, told from other results, named in the run key, fetched and checked."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.trainer.kit import make_run, make_settings
from tests.unit.api.builders import spec
from tunewright_api.run_config import HubSettings, StorageSettings, TrainRun, build_train_run
from tunewright_api.run_report import RunReport
from tunewright_trainer import inputs, publish, supervisor
from tunewright_trainer.errors import CorruptArtifact, InvalidConfiguration, InvalidModel, MissingFile
from tunewright_trainer.inputs import Inputs
from tunewright_trainer.reward_inputs import fetch_reward_models, find_reward_models
from tunewright_trainer.storage import Storage
from tunewright_trainer.transfer import Stop, ignore

KEY = "0123456789abcdef"


def tensors(**shapes: list[int]) -> bytes:
    """Build a safetensors file of bytes with these shapes; dots in names are written as __."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1]
        header[name.replace("__", ".")] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


HEAD = tensors(base_model__model__score__weight=[1, 8], base_model__model__layers__0__q_proj__lora_A__weight=[2, 8])


@dataclass
class Volume:
    """A volume with a base model on it, mounted as the claims are."""

    root: Path

    @property
    def storage(self) -> Storage:
        """Storage with the volume as the claim `c`."""
        return Storage(StorageSettings(), pvc_root=self.root)

    def base(self, name: str = "base") -> None:
        """Write a base model."""
        folder = self.root / "c" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(tensors(w=[1, 8]))
        (folder / "tokenizer.json").write_text("{}")

    def publish(
        self,
        kind: Literal["Adapter", "Model"],
        config: dict[str, Any],
        weights: bytes = HEAD,
        base: str = "pvc://c/base",
    ) -> None:
        """Publish a run to pvc://c/judge as the supervisor does."""
        root = "adapter" if kind == "Adapter" else "model"
        names = {"Adapter": ("adapter_config.json", "adapter_model"), "Model": ("config.json", "model")}[kind]
        version = inputs.find_model_at(base, None, HubSettings(), self.storage, Stop()).version
        document = {"run": {"model": {"uri": base}}, "inputs": {"model": {"uri": base, "version": version}}}
        output = self.root / "output" / str(len(list(self.root.rglob("*"))))
        (output / root).mkdir(parents=True)
        (output / root / names[0]).write_text(json.dumps(config))
        (output / root / f"{names[1]}.safetensors").write_bytes(weights)
        (output / "run.json").write_text(json.dumps(document))
        files = publish.output_files(output)
        result = publish.Result(KEY, "0a1b2c3d", kind, root, files, {})
        publish.publish(self.storage, "pvc://c/judge", result, ignore, print)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    """A volume with a base model."""
    made = Volume(tmp_path / "volumes")
    made.base()
    return made


def run_with(*rewards: dict[str, Any], model: str = "pvc://c/base") -> TrainRun:
    """Return a run that learns from rewards."""
    document = spec(model={"uri": model}, objective={"type": "GRPO", "grpo": {"rewards": list(rewards)}})
    return build_train_run(document, name="r", namespace="n", attempt=1, storage=StorageSettings())


JUDGED = {"type": "Model", "model": {"uri": "pvc://c/judge"}}
ADAPTER = {"task_type": "SEQ_CLS"}


def found_in(volume: Volume, run: TrainRun) -> Inputs:
    """Look up model and reward models."""
    storage, stop = volume.storage, Stop()
    return Inputs(inputs.find_model(run, storage, stop), {}, find_reward_models(run, storage, stop))


def test_an_adapter_of_the_same_base_shares_it(volume: Volume, tmp_path: Path) -> None:
    """Only the adapter is fetched; the worker takes the base of the task."""
    volume.publish("Adapter", ADAPTER)
    found = found_in(volume, run_with({"type": "JSON"}, JUDGED))
    (folder,) = fetch_reward_models(run_with(JUDGED), found, volume.storage, tmp_path / "rewards", Stop(), ignore)
    assert (folder.uri, folder.is_adapter, folder.base_path) == ("pvc://c/judge", True, None)
    assert (folder.path / "adapter_model.safetensors").read_bytes() == HEAD


def test_an_adapter_of_another_base_brings_it_along(volume: Volume, tmp_path: Path) -> None:
    """The base is the one that run.json names."""
    volume.base("other")
    volume.publish("Adapter", ADAPTER, base="pvc://c/other")
    found = found_in(volume, run_with(JUDGED))
    (folder,) = fetch_reward_models(run_with(JUDGED), found, volume.storage, tmp_path / "rewards", Stop(), ignore)
    assert folder.base_path == volume.root / "c" / "other"


def test_a_whole_model_needs_no_base(volume: Volume, tmp_path: Path) -> None:
    """After full fine-tuning everything lies in one folder."""
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    volume.publish("Model", config, tensors(score__weight=[1, 8]))
    found = found_in(volume, run_with(JUDGED))
    (folder,) = fetch_reward_models(run_with(JUDGED), found, volume.storage, tmp_path / "rewards", Stop(), ignore)
    assert (folder.is_adapter, folder.base_path) == (False, None)


def test_the_reward_model_is_part_of_the_run_key(volume: Volume) -> None:
    """Another reward model behind the same URI makes another run."""
    run = run_with(JUDGED)
    volume.publish("Adapter", ADAPTER)
    first = found_in(volume, run)
    assert first.key(run) == found_in(volume, run).key(run)
    for path in (volume.root / "c/judge").rglob("*.json"):
        path.unlink()
    volume.publish("Adapter", {**ADAPTER, "r": 4})
    assert found_in(volume, run).key(run) != first.key(run)


LM_HEAD = tensors(lm_head__weight=[9, 8])
NO_REWARD_MODELS: dict[str, tuple[Literal["Adapter", "Model"], dict[str, Any], bytes, str]] = {
    "language model adapter": ("Adapter", {"task_type": "CAUSAL_LM"}, HEAD, r"no score head \(task_type 'CAUSAL_LM'"),
    "adapter without head": ("Adapter", ADAPTER, LM_HEAD, "there is no score head among its weights"),
    "adapter of a classifier": (
        "Adapter", ADAPTER, tensors(base_model__model__score__weight=[3, 8]), "its head gives 3 numbers",
    ),
    "language model": ("Model", {"architectures": ["LlamaForCausalLM"]}, LM_HEAD, "architecture LlamaForCausalLM"),
    "classifier": ("Model", {"architectures": ["LlamaForSequenceClassification"]}, LM_HEAD, "gives 2 numbers"),
    "model without head": (
        "Model",
        {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}},
        LM_HEAD,
        "there is no score head among its weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_REWARD_MODELS)
def test_what_is_no_reward_model(case: str, volume: Volume, tmp_path: Path) -> None:
    """Refused before the worker loads anything, with what is missing and what to do."""
    kind, config, weights, message = NO_REWARD_MODELS[case]
    volume.publish(kind, config, weights)
    run = run_with(JUDGED)
    with pytest.raises(InvalidModel, match=f"pvc://c/judge: not a reward model: .*{message}.*objective.type Reward"):
        fetch_reward_models(run, found_in(volume, run), volume.storage, tmp_path / "r", Stop(), ignore)


def test_a_base_that_changed(volume: Volume) -> None:
    """Scores of an adapter on another base than it was trained on would mean nothing."""
    volume.base("other")
    volume.publish("Adapter", ADAPTER, base="pvc://c/other")
    (volume.root / "c/other/tokenizer.json").write_text('{"changed": 1}')
    with pytest.raises(InvalidModel, match="was trained on pvc://c/other as it was then"):
        found_in(volume, run_with(JUDGED))


def test_nothing_published(volume: Volume) -> None:
    """A run that did not end has no manifest."""
    with pytest.raises(MissingFile, match="pvc://c/judge: no published result"):
        found_in(volume, run_with(JUDGED))


def test_a_file_that_differs_from_the_manifest(volume: Volume) -> None:
    """What is read to judge the result is verified like all else."""
    volume.publish("Adapter", ADAPTER)
    (path,) = (volume.root / "c").rglob("adapter_config.json")
    path.write_text('{"task_type": "SEQ_CLS", "evil": 1}')
    with pytest.raises(CorruptArtifact, match="SHA-256 is"):
        found_in(volume, run_with(JUDGED))


def test_patterns_that_only_python_knows(volume: Volume) -> None:
    """What passes the rules and is no RE2 all the same is refused with RE2's own words."""
    with pytest.raises(InvalidConfiguration, match=r"rewards\[1\]\.regex\.pattern 'a\{1001\}': .*repetition"):
        found_in(volume, run_with({"type": "JSON"}, {"type": "Regex", "regex": {"pattern": "a{1001}"}}))


def supervised(volume: Volume, tmp_path: Path) -> tuple[RunReport, Path]:
    """Run on prompts with a worker that only plays training; return the report and the work folder."""
    (volume.root / "c/train.jsonl").write_text(json.dumps({"prompt": "Q"}) + "\n")
    given: dict[str, Any] = {
        "model": {"uri": "pvc://c/base"},
        "dataset": {"train": [{"uri": "pvc://c/train.jsonl"}]},
        "objective": {"type": "GRPO", "grpo": {"rewards": [JUDGED]}},
        "output": {"uri": "pvc://c/out"},
    }
    settings = make_settings(tmp_path / "work", pvc_root=volume.root)
    return supervisor.run(make_run(None, **given), settings), settings.work


def test_the_worker_is_told_where_the_reward_model_lies(volume: Volume, tmp_path: Path) -> None:
    """The task has the local folder, run.json the digest."""
    volume.publish("Adapter", ADAPTER)
    report, work = supervised(volume, tmp_path)
    assert report.reason == "Succeeded", report.message
    (folder,) = json.loads((work / "task.json").read_text())["rewardModels"]
    assert folder == {"uri": "pvc://c/judge", "path": str(work / "rewards/0"), "isAdapter": True}
    document = json.loads((work / "output/run.json").read_text())
    assert document["inputs"]["rewardModels"][0]["digest"].startswith("sha256:")


def test_the_worker_never_sees_what_is_no_reward_model(volume: Volume, tmp_path: Path) -> None:
    """The run fails with the message, and no task was written."""
    volume.publish("Adapter", {"task_type": "CAUSAL_LM"})
    report, work = supervised(volume, tmp_path)
    assert (report.exit_code, report.reason) == (20, "InvalidModel")
    assert "has no score head" in report.message
    assert not (work / "task.json").exists()
