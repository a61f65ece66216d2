"""Merges from document to report, against a real S3 server and real models, each proved by the real check of logits."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.cluster import gguftools
from tests.hub_server import HubServer, User
from tests.trainer.kit import WRITER, Bucket
from tests.trainer.merge_run_kit import (
    adapter_tensors,
    merge_run,
    merge_settings,
    publish_adapter,
    upload_folder,
    write_adapter,
)
from tests.trainer.s3_fixtures import bucket, server, shared_bucket, storage
from tunewright_api.run_report import RunReport
from tunewright_api.v1alpha1.adaptermerge import AdapterSource
from tunewright_cli.kubectl_yaml import read_documents
from tunewright_cli.main import app
from tunewright_trainer import supervisor
from tunewright_trainer.merge import four_bits, product
from tunewright_trainer.merge.adapter import Adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.gguf_tools import TOOLS_VARIABLE
from tunewright_trainer.merge.inputs import TrainedOn, find_adapter
from tunewright_trainer.merge.sinks import StorageSink, WrittenFile
from tunewright_trainer.merge.stream import MergeFindings, merge
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.storage import Storage
from tunewright_trainer.transfer import Stop

__all__ = ["bucket", "server", "shared_bucket", "storage"]

pytestmark = pytest.mark.timeout(300)
"""The process that compares logits imports the training stack."""

BASE = "s3://tests/base"
OUT = "s3://tests/out"
EXAMPLE = Path(__file__).parents[2] / "examples/merge-adapters.yaml"
TOKEN = "hf_secret-of-alice"
LOCAL: dict[str, Any] = {"output": {"uri": OUT}}
ADAPTERS = "s3://tests/adapters"


@pytest.fixture
def inputs(bucket: Bucket, storage: Storage, tiny: Path, tmp_path: Path) -> Bucket:
    """A bucket with the tiny Llama and an adapter that was published for it."""
    upload_folder(bucket, tiny, "base")
    publish_adapter(storage, ADAPTERS, write_adapter(tmp_path / "adapter", BASE), BASE)
    return bucket


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Iterator[HubServer]:
    """A hub with the tiny Llama."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer.start() as running:
        running.part_bytes = 4_000_000
        running.tokens[TOKEN] = User("alice", ("org",))
        running.add("model", "org/base", {path.name: path.read_bytes() for path in tiny.iterdir()})
        yield running


def run(bucket: Bucket, settings: SupervisorSettings, **spec: Any) -> RunReport:
    """Merge on the inputs of a bucket."""
    given: dict[str, Any] = {"adapters": [{"uri": ADAPTERS}], "output": {"uri": OUT}, **spec}
    return supervisor.run(merge_run(bucket.server.endpoint, **given), settings)


def test_a_merge_is_published(inputs: Bucket, storage: Storage, tmp_path: Path, tiny: Path) -> None:
    """The merged model lies in the run's folder with everything that was proved of it, and is base plus delta."""
    settings = merge_settings(tmp_path / "work", inputs, termination_log=tmp_path / "termination")
    report = run(inputs, settings, dtype="Float32")
    assert (report.exit_code, report.reason, report.stage) == (0, "Succeeded", "Finished"), report.message
    assert (tmp_path / "termination").read_text() == report.to_json()
    own = f"out/{report.run_key}/{WRITER}"
    assert report.output is not None
    assert report.output.uri == f"s3://tests/{own}/merged"
    manifest = inputs.json(f"out/{report.run_key}/manifest.json")
    assert (manifest["kind"], manifest["root"]) == ("Model", f"{WRITER}/merged")
    names = {f"{own}/{name}" for name in ("README.md", "run.json", "logs/attempt-1.log", "report.json")}
    names |= {f"{own}/merged/{name}" for name in ("README.md", *(path.name for path in tiny.iterdir()))}
    assert set(inputs.stored("out")) == {*names, f"out/{report.run_key}/manifest.json", "out/latest.json"}
    for file in manifest["files"]:
        body = inputs.client.get_object(Bucket="tests", Key=f"out/{report.run_key}/{file['path']}")["Body"].read()
        assert hashlib.sha256(body).hexdigest() == file["sha256"]
    verification = manifest["verification"]
    assert verification["passed"]
    assert (verification["adapterTensors"], verification["changedTensors"]) == (12, 6)
    assert verification["maxDivergence"] < verification["allowedDivergence"] < verification["effect"]
    assert report.verification is not None
    assert report.verification.document() == verification
    assert report.merge is not None
    assert (report.merge.base_uri, report.merge.changed_tensors) == (BASE, 6)
    inputs.client.download_file("tests", f"{own}/merged/model.safetensors", str(tmp_path / "merged.safetensors"))
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "merged.safetensors")
    factors = adapter_tensors(1)
    name = "model.layers.1.mlp.down_proj"
    delta = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * delta, rtol=1e-6, atol=1e-7)
    assert sum(not np.array_equal(before[key], after[key]) for key in before) == 6
    card = (inputs.client.get_object(Bucket="tests", Key=f"{own}/merged/README.md")["Body"].read()).decode()
    assert "12 tensors of the adapter, all of them used; 6 tensors of the model changed" in card
    document = inputs.json(f"{own}/run.json")
    assert document["inputs"]["model"] == {"uri": BASE, "version": report.merge.base_version}
    assert json.loads(report.to_json())["merge"]["adapters"][0]["uri"].endswith("/manifest.json")
    checked = CliRunner().invoke(app, ["verify", OUT, "--endpoint", inputs.server.endpoint])
    assert checked.exit_code == 0, checked.output
    assert "files     passed" in checked.output
    assert "bit by bit: 6 tensors changed" in checked.output
    other = write_adapter(tmp_path / "changed", BASE, seed=9)
    publish_adapter(storage, ADAPTERS, other, BASE, key="ef" * 8)
    assert CliRunner().invoke(app, ["verify", OUT, "--endpoint", inputs.server.endpoint]).exit_code == 0
    inputs.client.upload_file(str(tmp_path / "merged.safetensors"), "tests", f"{own}/merged/config.json")
    broken = CliRunner().invoke(app, ["verify", OUT, "--endpoint", inputs.server.endpoint, "--output", "json"])
    assert broken.exit_code == 1
    (check,) = json.loads(broken.stdout)["checks"]
    assert (check["name"], check["passed"]) == ("files", False)
    assert "merged/config.json has " in check["detail"]


def test_several_adapters_from_and_to_the_hub(
    bucket: Bucket, storage: Storage, tiny: Path, tmp_path: Path, hub: HubServer
) -> None:
    """The example: a base on the hub is merged in the commit that the adapters were trained on, in files of the asked
    size; the merged model is pushed; what two adapters add is the weighted sum of what each would add."""
    commit = hub.repositories["model", "org/base"].branches["main"][-1].oid
    hub.repositories["model", "org/base"].commit("main", "another model", "", {"config.json": b"{}"})
    (example,) = read_documents(EXAMPLE.read_text(), EXAMPLE.name)
    weights = [adapter["weight"] for adapter in example.content["spec"]["adapters"]]
    folders = [write_adapter(tmp_path / f"{n}", "org/base", seed=n, revision=commit) for n in (1, 2)]
    upload_folder(bucket, folders[0], "plain")
    hub.add("model", "org/tone", {path.name: path.read_bytes() for path in folders[1].iterdir()})
    uris = ("s3://tests/plain", "hf://org/tone")
    adapters = [{"uri": uri, "weight": weight} for uri, weight in zip(uris, weights, strict=True)]
    here = {
        "maxShardSize": "8MB",
        "adapters": adapters,
        "output": {"uri": OUT, "hub": {"repository": "org/merged"}},
        "hub": {"endpoint": hub.endpoint, "secretName": "hf-token"},
    }
    settings = merge_settings(tmp_path / "work", bucket, environment={"HF_TOKEN": TOKEN})
    report = run(bucket, settings, **{**example.content["spec"], **here})
    assert (report.exit_code, report.reason) == (0, "Succeeded"), report.message
    assert report.merge is not None
    assert (report.merge.base_uri, report.merge.base_version, report.merge.shards) == ("hf://org/base", commit, 2)
    pushed = hub.repositories["model", "org/merged"].branches["main"][-1]
    assert report.output is not None
    assert report.output.hub_url == f"{hub.endpoint}/org/merged/tree/{pushed.oid}"
    index = json.loads(pushed.files["model.safetensors.index.json"])["weight_map"]
    card = pushed.files["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("org/merged")' in card
    assert "Combined by Concatenate." in card
    name = "model.layers.0.self_attn.v_proj"
    (tmp_path / "shard").write_bytes(pushed.files[index[f"{name}.weight"]])
    expected = load_file(tiny / "model.safetensors")[f"{name}.weight"]
    for number, weight in enumerate(weights, 1):
        factors = adapter_tensors(number)
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = expected + weight * 2 * (b @ a)
    np.testing.assert_allclose(load_file(tmp_path / "shard")[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert report.verification is not None
    assert report.verification.vllm == []
    assert not (set(bucket.environment.values()) | {TOKEN}) & set(
        (tmp_path / "work/logs/attempt-1.log").read_text().split()
    )


def test_a_combination_is_published_as_an_adapter(inputs: Bucket, storage: Storage, tmp_path: Path) -> None:
    """With adapterOnly the result is an adapter of the same base, which merges like one that was trained."""
    other = "s3://tests/more"
    publish_adapter(storage, other, write_adapter(tmp_path / "other", BASE, seed=2), BASE, key="cd" * 8)
    both = [{"uri": ADAPTERS, "weight": 0.75}, {"uri": other, "weight": 0.25}]
    given = {"adapters": both, "combination": {"type": "SVD", "svdRank": 6}}
    given["output"] = {"uri": OUT, "adapterOnly": True}
    report = run(inputs, merge_settings(tmp_path / "work", inputs), **given)
    assert (report.exit_code, report.reason) == (0, "Succeeded"), report.message
    manifest = inputs.json(f"out/{report.run_key}/manifest.json")
    assert (manifest["kind"], manifest["root"]) == ("Adapter", f"{WRITER}/adapter")
    own = f"out/{report.run_key}/{WRITER}"
    assert inputs.json(f"{own}/adapter/adapter_config.json")["r"] == 6
    assert f"{own}/adapter/adapter_model.safetensors" in inputs.stored("out")
    document = inputs.json(f"{own}/run.json")
    assert document["inputs"]["model"]["uri"] == BASE
    assert [adapter["weight"] for adapter in document["inputs"]["adapters"]] == [0.75, 0.25]
    found = find_adapter(AdapterSource(uri=OUT), 0, merge_run(None, adapters=both, **LOCAL), storage, Stop(), tmp_path)
    assert found.base == TrainedOn(BASE, document["inputs"]["model"]["version"])
    again = run(inputs, merge_settings(tmp_path / "again", inputs, writer="bbbbbbbb"), **given)
    assert (again.reason, again.cached, again.output) == ("Cached", True, report.output)
    assert (again.merge, again.verification) == (report.merge, report.verification)


def test_into_what_a_quantized_base_was(bucket: Bucket, storage: Storage, tiny: Path, tmp_path: Path) -> None:
    """An adapter of QLoRA is merged into the base as it saw it, which its run.json tells: layers that it acts on come
    back from 4 bits with the change added, others are the base's; `verify` merges and compares logits again."""
    upload_folder(bucket, tiny, "base")
    quantization = {"bits": 4, "type": "FP4", "doubleQuant": False}
    document: dict[str, Any] = {"run": {"method": "QLoRA", "quantization": quantization}}
    publish_adapter(storage, ADAPTERS, write_adapter(tmp_path / "adapter", BASE), BASE, **document)
    report = run(bucket, merge_settings(tmp_path / "work", bucket), quantizedBase="Dequantized", dtype="Float32")
    assert (report.exit_code, report.reason) == (0, "Succeeded"), report.message
    key = f"out/{report.run_key}/{WRITER}/merged/model.safetensors"
    bucket.client.download_file("tests", key, str(tmp_path / "merged.safetensors"))
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "merged.safetensors")
    name, other = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj.weight"
    seen = four_bits.code_of("FP4")
    scales = four_bits.block_scales(before[f"{name}.weight"].reshape(-1))
    factors = adapter_tensors(1)
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    base = (after[f"{name}.weight"] - 2 * (b @ a)).reshape(-1, 64) / scales[:, None]
    assert np.abs(base[..., None] - seen).min(axis=-1).max() < 1e-4
    np.testing.assert_array_equal(after[other], before[other])
    arguments = ["verify", OUT, "--logits", "--endpoint", bucket.server.endpoint]
    checked = CliRunner().invoke(app, arguments, env=bucket.environment)
    assert checked.exit_code == 0, checked.output
    for line in ("files     passed", "weights   passed", "logits    passed"):
        assert line in checked.output


def test_on_this_machine(tiny: Path, tmp_path: Path) -> None:
    """`tunewright run` merges local folders, prints what was proved, and does nothing the second time."""
    write_adapter(tmp_path / "adapter", str(tiny))
    file = tmp_path / "merge.yaml"
    file.write_text(f"""\
apiVersion: tunewright.dev/v1alpha1
kind: AdapterMerge
metadata: {{name: local}}
spec:
  adapters: [{{uri: {tmp_path}/adapter}}]
  dtype: BFloat16
  output: {{uri: {tmp_path}/out}}
""")
    first = CliRunner().invoke(app, ["run", "-f", str(file), "--work", str(tmp_path / "work")])
    assert first.exit_code == 0, first.output
    assert "complete         Succeeded" in first.output
    assert "verified         12 tensors of the adapter used, 6 of the model changed" in first.output
    second = CliRunner().invoke(app, ["run", "-f", str(file), "--output", "json"])
    report = json.loads(second.output)
    assert (second.exit_code, report["reason"], report["verification"]["passed"]) == (0, "Cached", True)
    assert (
        Path(report["output"]["uri"], "chat_template.jinja").read_text() == (tiny / "chat_template.jinja").read_text()
    )


def test_gguf_files_come_with_the_model(tiny: Path, tmp_path: Path) -> None:
    """llama.cpp's files lie beside the model, in the same manifest, and the report says what each is worth."""
    write_adapter(tmp_path / "adapter", str(tiny))
    given: dict[str, Any] = {"adapters": [{"uri": f"{tmp_path}/adapter"}], "output": {"uri": f"{tmp_path}/out"}}
    document = merge_run(None, local=True, export={"gguf": ["Q8_0"]}, **given)
    tools = {TOOLS_VARIABLE: str(gguftools.build().folder)}
    report = supervisor.run(document, merge_settings(tmp_path / "work", local=True, environment=tools))
    assert (report.exit_code, report.reason) == (0, "Succeeded"), report.message
    assert report.output is not None
    assert report.output.gguf_uris is not None
    (uri,) = report.output.gguf_uris
    assert uri == f"{tmp_path}/out/{report.run_key}/{WRITER}/gguf/support-bot-Q8_0.gguf"
    assert Path(uri).read_bytes()[:4] == b"GGUF"
    manifest = json.loads(Path(report.output.manifest_uri).read_text())
    assert f"{WRITER}/gguf/support-bot-Q8_0.gguf" in [file["path"] for file in manifest["files"]]
    assert "same most likely token" in " ".join(manifest["verification"]["notes"])
    assert CliRunner().invoke(app, ["verify", f"{tmp_path}/out"]).exit_code == 0


def wrong_scale(base: Checkpoint, adapter: Adapter, *arguments: Any, **options: Any) -> MergeFindings:
    """Merge with twice the adapter's scale."""
    return merge(base, replace(adapter, config={**adapter.config, "lora_alpha": 16}), *arguments, **options)


class Nowhere:
    """A file that is never stored."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Forget the data."""

    def finish(self) -> WrittenFile:
        """Say anything."""
        return WrittenFile("", 0, "")

    abort = finish


class WithoutTemplate(StorageSink):
    """Leaves out the chat template."""

    def open(self, name: str, size_bytes: int) -> Any:
        """Begin a file."""
        return Nowhere() if name == "chat_template.jinja" else super().open(name, size_bytes)


def template_lost(base: Checkpoint, adapter: Adapter, sink: Any, **options: Any) -> MergeFindings:
    """Merge and say nothing of a chat template."""
    inner = sink._sink
    findings = merge(base, adapter, WithoutTemplate(inner._storage, inner._folder_uri), **options)
    return replace(findings, files=tuple(file for file in findings.files if file.name))


@pytest.mark.parametrize(
    ("sabotaged", "message"),
    [(wrong_scale, "the merged model does not give the logits of base and adapter"), (template_lost, "chat template")],
)
def test_a_model_that_answers_otherwise_is_not_published(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotaged: Any, message: str
) -> None:
    """A wrong scale, and a lost chat template: only running the model, and its tokenizer, shows them."""
    monkeypatch.setattr(product, "merge", sabotaged)
    write_adapter(tmp_path / "adapter", str(tiny))
    document = merge_run(None, local=True, adapters=[{"uri": f"{tmp_path}/adapter"}], output={"uri": f"{tmp_path}/out"})
    report = supervisor.run(document, merge_settings(tmp_path / "work", local=True))
    assert (report.exit_code, report.reason) == (20, "VerificationFailed"), report.message
    assert message in report.message
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_two_at_once_publish_one_result(inputs: Bucket, tmp_path: Path) -> None:
    """Two pods of the same merge that end together: both succeed, one result is valid, the other's files are gone."""
    reports: list[RunReport] = []

    def one(writer: str) -> None:
        reports.append(run(inputs, merge_settings(tmp_path / writer, inputs, writer=writer)))

    threads = [threading.Thread(target=one, args=(letter * 8,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.exit_code for report in reports] == [0, 0]
    assert reports[0].output == reports[1].output
    keys = inputs.stored("out")
    assert sum(key.endswith("manifest.json") for key in keys) == 1
    assert len({key.split("/")[2] for key in keys if key.count("/") > 2}) == 1
