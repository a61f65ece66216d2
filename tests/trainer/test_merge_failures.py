"""Every way a merge can fail before its logits are compared: exit code, reason, message, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save

from tests.s3_proxy import proxied
from tests.trainer.kit import Bucket
from tests.trainer.merge_run_kit import (
    adapter_config,
    adapter_tensors,
    base_tensors,
    merge_run,
    merge_settings,
    publish_adapter,
    upload_folder,
    write_adapter,
    write_base,
)
from tests.trainer.s3_fixtures import bucket, server, shared_bucket, storage
from tunewright_api.run_report import Progress, RunReport
from tunewright_trainer import s3, supervisor
from tunewright_trainer.merge import product
from tunewright_trainer.merge.adapter import Adapter, load_adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.readers import FolderReader
from tunewright_trainer.merge.sinks import FileWriter, StorageSink, WrittenFile
from tunewright_trainer.merge.stream import MergeFindings, merge
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.storage import Storage

__all__ = ["bucket", "server", "shared_bucket", "storage"]

BASE = "s3://tests/base"
PLAIN = "s3://tests/plain"
PUBLISHED = "s3://tests/adapters"
OTHER = "s3://tests/other"
OUT = "s3://tests/out"
WEIGHTS = "plain/adapter_model.safetensors"
Spec = dict[str, Any]


@pytest.fixture
def inputs(bucket: Bucket, storage: Storage, tmp_path: Path) -> Bucket:
    """A bucket with a base, an adapter that peft wrote, and two that were published."""
    upload_folder(bucket, write_base(tmp_path / "base"), "base")
    upload_folder(bucket, write_adapter(tmp_path / "plain", BASE), "plain")
    publish_adapter(storage, PUBLISHED, write_adapter(tmp_path / "published", BASE, seed=2), BASE)
    publish_adapter(storage, OTHER, write_adapter(tmp_path / "other", BASE, seed=3), BASE)
    return bucket


def fail(bucket: Bucket, settings: SupervisorSettings, *, endpoint: str | None = None, **spec: Any) -> RunReport:
    """Merge, expecting a failure: a report that fits, and nothing in the output folder."""
    given = {"adapters": [{"uri": PLAIN}], "output": {"uri": OUT}, **spec}
    report = supervisor.run(merge_run(endpoint or bucket.server.endpoint, **given), settings)
    assert report.exit_code != 0
    assert bucket.server.secret_key not in report.message
    assert bucket.stored("out") == []
    uploads = bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])
    assert [upload["Key"] for upload in uploads if upload["Key"].startswith("out/")] == []
    return report


def put_adapter(bucket: Bucket, tensors: dict[str, np.ndarray]) -> None:
    """Replace the weights of the adapter that peft wrote."""
    bucket.put(WEIGHTS, save(tensors))


def put_config(bucket: Bucket, base: str = BASE, **changes: Any) -> None:
    """Replace its configuration."""
    bucket.put("plain/adapter_config.json", json.dumps(adapter_config(base, **changes)))


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """Return the adapter's tensors with those of a name changed."""
    return {key: change(value) if name in key else value for key, value in adapter_tensors(1).items()}


def with_nan(tensor: np.ndarray) -> np.ndarray:
    """Put a NaN in."""
    return np.where(np.arange(tensor.size).reshape(tensor.shape) == 3, np.float32(np.nan), tensor)


def other_base(bucket: Bucket, **changes: Any) -> None:
    """Replace the base's weights."""
    bucket.put("base/model.safetensors", save(base_tensors(**changes)))


def without_a_shard(bucket: Bucket) -> None:
    """Put an index of two files in the place of the one file, and only one of them."""
    tensors = base_tensors()
    first = dict(list(tensors.items())[:4])
    names = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in tensors}
    bucket.client.delete_object(Bucket=bucket.name, Key="base/model.safetensors")
    bucket.put("base/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": names}))
    bucket.put("base/model-00001-of-00002.safetensors", save(first))


def cut(bucket: Bucket, key: str, length: int) -> None:
    """Take bytes from the end of an object."""
    content = bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read()
    bucket.put(key, content[:-length])


def rename(bucket: Bucket, old: str, new: str) -> None:
    """Give an object another name."""
    content = bucket.client.get_object(Bucket=bucket.name, Key=old)["Body"].read()
    bucket.put(new, content)
    bucket.client.delete_object(Bucket=bucket.name, Key=old)


def as_model(bucket: Bucket) -> None:
    """Let the manifest of a published adapter say that it is a model."""
    key = f"adapters/{'ab' * 8}/manifest.json"
    bucket.put(key, json.dumps({**bucket.json(key), "kind": "Model"}))


def lost_in_rounding(bucket: Bucket) -> None:
    """Put a base of 16 bits there, and changes that are far smaller than its steps."""
    bucket.put("base/model.safetensors", save({k: v.astype(np.float16) for k, v in base_tensors().items()}))
    put_adapter(bucket, changed("lora_B", lambda t: t * np.float32(1e-7)))


def nothing(bucket: Bucket) -> None:
    """Leave everything as it is."""


TWO = [{"uri": PUBLISHED}, {"uri": OTHER}]
Prepare = Callable[[Bucket], object]
CASES: dict[str, tuple[Prepare, Spec, str, str]] = {
    "another base, by shapes": (lambda b: other_base(b, hidden=32), {}, "InvalidAdapter", "another model"),
    "another base, by names": (lambda b: other_base(b, prefix="transformer"), {}, "InvalidAdapter", "layers.0"),
    "another revision of the base": (
        lambda b: other_base(b, seed=1),
        {"adapters": [{"uri": PUBLISHED}]},
        "InvalidAdapter",
        "was trained on another revision of s3://tests/base: on sha256:",
    ),
    "bases of two revisions": (
        lambda b: other_base(b, seed=1),
        {"adapters": TWO},
        "InvalidAdapter",
        "another revision",
    ),
    "adapters of two bases": (
        lambda b: put_config(b, "s3://tests/base2"),
        {"adapters": [{"uri": PUBLISHED}, {"uri": PLAIN}]},
        "InvalidAdapter",
        "different base models",
    ),
    "missing shard": (without_a_shard, {}, "InvalidModel", "1 of 2 weight files are missing: model-00002-of-00002"),
    "truncated base": (lambda b: cut(b, "base/model.safetensors", 10), {}, "InvalidModel", "truncated"),
    "truncated adapter": (lambda b: cut(b, WEIGHTS, 10), {}, "InvalidAdapter", "truncated"),
    "no tokenizer": (
        lambda b: b.client.delete_object(Bucket=b.name, Key="base/tokenizer.json"),
        {},
        "InvalidModel",
        "no tokenizer",
    ),
    "NaN": (lambda b: put_adapter(b, changed("v_proj", with_nan)), {}, "InvalidAdapter", "NaN or infinite"),
    "rank 0": (lambda b: put_config(b, r=0), {}, "InvalidAdapter", "r is 0: a rank is a whole number above 0"),
    "empty": (lambda b: put_adapter(b, {}), {}, "InvalidAdapter", "has no tensors"),
    "prefix tuning": (lambda b: put_config(b, peft_type="PREFIX_TUNING"), {}, "InvalidAdapter", "PREFIX_TUNING"),
    "another kind": (lambda b: put_config(b, peft_type="LOHA"), {}, "InvalidAdapter", "LOHA"),
    "weights that sum to nothing": (
        nothing,
        {"adapters": [{"uri": PUBLISHED, "weight": 1.0}, {"uri": OTHER, "weight": -1.0}]},
        "InvalidConfiguration",
        "the weights 1, -1 sum to nothing",
    ),
    "pickle as the base": (
        lambda b: rename(b, "base/model.safetensors", "base/pytorch_model.bin"),
        {},
        "InvalidModel",
        "the weights are pickles (pytorch_model.bin), which are never loaded",
    ),
    "pickle as the adapter": (
        lambda b: rename(b, WEIGHTS, "plain/adapter_model.bin"),
        {},
        "InvalidAdapter",
        "adapters[0]: s3://tests/plain: no adapter_model.safetensors: the weights are a pickle",
    ),
    "a published model": (
        as_model,
        {"adapters": [{"uri": PUBLISHED}]},
        "InvalidAdapter",
        "is a whole model, not an adapter",
    ),
    "a plain model": (
        nothing,
        {"adapters": [{"uri": BASE}]},
        "InvalidAdapter",
        "adapters[0]: s3://tests/base: no adapter_config.json: this is a whole model, not an adapter",
    ),
    "nothing there": (
        nothing,
        {"adapters": [{"uri": "s3://tests/nowhere"}]},
        "MissingFile",
        "adapters[0]: s3://tests/nowhere: no published result",
    ),
    "no name of a base": (lambda b: put_config(b, ""), {}, "InvalidAdapter", "names no model as its base model"),
    "a base by path": (lambda b: put_config(b, "/root/base"), {}, "InvalidAdapter", "which is no address"),
    "a base that is not there": (
        nothing,
        {"base": {"uri": "s3://tests/nowhere"}},
        "MissingFile",
        "s3://tests/nowhere: no files are there",
    ),
    "layers that are not there": (
        lambda b: put_adapter(b, {k.replace("layers.1", "layers.7"): v for k, v in adapter_tensors(1).items()}),
        {},
        "InvalidAdapter",
        "layers.7",
    ),
    "damaged after it was published": (
        lambda b: b.put(f"adapters/{'ab' * 8}/feedbeef/adapter/adapter_config.json", "{}"),
        {"adapters": [{"uri": PUBLISHED}]},
        "InvalidAdapter",
        "SHA-256",
    ),
    "a quantization nobody knows": (
        nothing,
        {"quantizedBase": "Dequantized"},
        "InvalidConfiguration",
        "quantizedBase is Dequantized, but adapters[0]: s3://tests/plain is not the result",
    ),
    "what vLLM does not serve": (
        lambda b: put_config(b, r=64),
        {"verification": {"vllm": {"maxLoraRank": 16, "required": True}}},
        "InvalidAdapter",
        "verification.vllm.required",
    ),
    "no GGUF tools": (nothing, {"export": {"gguf": ["Q8_0"]}}, "InvalidConfiguration", "export.gguf needs llama.cpp"),
    "untrained": (
        lambda b: put_adapter(b, changed("lora_B", np.zeros_like)),
        {},
        "VerificationFailed",
        "the merged model would be identical to the base of adapters[0]: s3://tests/plain: all of its changes are 0",
    ),
    "lost in rounding": (
        lost_in_rounding,
        {},
        "VerificationFailed",
        "its changes are smaller than a rounding step: merge with dtype Float32",
    ),
    "beyond the number format": (
        lambda b: put_adapter(b, changed("lora_B", lambda t: t * np.float32(1e7))),
        {"dtype": "Float16"},
        "VerificationFailed",
        "too large for its number format",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(inputs: Bucket, tmp_path: Path, case: str) -> None:
    """What is wrong is told by name and place and is not tried again; nothing is published."""
    prepare, spec, reason, message = CASES[case]
    prepare(inputs)
    settings = merge_settings(tmp_path / "work", inputs, environment={"TUNEWRIGHT_GGUF_TOOLS": "/nonexistent"})
    report = fail(inputs, settings, **spec)
    assert (report.exit_code, report.reason) == (20, reason), report.message
    assert message in report.message


def layer_left_out(base: Checkpoint, adapter: Adapter, *arguments: Any, **options: Any) -> MergeFindings:
    """Merge as if the second layer had nothing to add."""
    tensors = {k: np.zeros_like(v) if "layers.1" in k else v for k, v in adapter_tensors(1).items()}
    folder = Path(adapter.reader._path).with_name("silenced")  # type: ignore[attr-defined]
    silenced = load_adapter(write_adapter(folder, BASE, tensors=tensors))
    return merge(base, silenced, *arguments, **options)


def tensors_left_out(base: Checkpoint, adapter: Adapter, *arguments: Any, **options: Any) -> MergeFindings:
    """Merge, but with one tensor of the adapter not used."""
    findings = merge(base, adapter, *arguments, **options)
    return replace(findings, adapter_tensors=findings.adapter_tensors - 1)


def into_another_base(base: Checkpoint, adapter: Adapter, *arguments: Any, **options: Any) -> MergeFindings:
    """Merge into weights that are not the base's."""
    folder = Path(adapter.reader._path).with_name("another")  # type: ignore[attr-defined]
    return merge(Checkpoint(FolderReader(write_base(folder, seed=5))), adapter, *arguments, **options)


class Loses(StorageSink):
    """Says that it has stored the tokenizer."""

    def open(self, name: str, size_bytes: int) -> FileWriter:
        """Begin a file."""
        writer = super().open(name, size_bytes)
        if name == "tokenizer.json":

            def lose() -> WrittenFile:
                writer.abort()
                return WrittenFile(name, size_bytes, "0" * 64)

            writer.finish = lose  # type: ignore[method-assign]
        return writer


class Flips(StorageSink):
    """Flips a bit of the weights on the way."""

    def open(self, name: str, size_bytes: int) -> FileWriter:
        """Begin a file."""
        writer = super().open(name, size_bytes)
        write = writer.write

        def flip(data: Any) -> None:
            # The embedding, and not the header before it.
            write(bytes([data[0] ^ 1]) + bytes(data[1:]) if len(data) > 10_000 else data)

        writer.write = flip  # type: ignore[method-assign]
        return writer


@pytest.mark.parametrize(
    ("name", "sabotaged", "message"),
    [
        ("merge", layer_left_out, "'model.layers.1.self_attn.q_proj.weight'"),
        ("merge", tensors_left_out, "11 of 12 tensors of adapters[0]: s3://tests/plain were used"),
        ("merge", into_another_base, "model.norm.weight differs from the base's"),
        ("StorageSink", Loses, "storage does not have what was written: 'tokenizer.json'"),
        ("StorageSink", Flips, "differs from the base's, although the adapter does not change it"),
    ],
)
def test_a_sabotaged_merge_is_not_published(
    inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sabotaged: Any, message: str
) -> None:
    """A layer left out, a tensor not used, another base, a lost file, a flipped bit: all caught by numbers."""
    monkeypatch.setattr(product, name, sabotaged)
    report = fail(inputs, merge_settings(tmp_path / "work", inputs))
    assert (report.exit_code, report.reason) == (20, "VerificationFailed"), report.message
    assert message in report.message
    assert report.message.endswith("; nothing is published")


def test_refused_credentials(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 21, which is never retried."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the right one")
    report = supervisor.run(
        merge_run(inputs.server.endpoint, adapters=[{"uri": PLAIN}], output={"uri": OUT}),
        merge_settings(tmp_path / "work"),
    )
    assert (report.exit_code, report.reason) == (21, "AccessDenied")


def test_storage_that_fails_in_the_middle_of_an_upload(
    inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 23, no files, no parts of files, and another attempt is worth it."""
    monkeypatch.setattr(s3, "OUTAGE_SECONDS", 1.0)
    with proxied(inputs.server) as proxy:
        proxy.only = "/merged/model.safetensors"
        proxy.always = "503"
        report = fail(inputs, merge_settings(tmp_path / "work", inputs), endpoint=proxy.endpoint)
    assert (report.exit_code, report.reason) == (23, "StorageUnavailable")


def test_a_stop_takes_everything_away(inputs: Bucket, tmp_path: Path) -> None:
    """A pod that is deleted while it merges ends with Preempted, and leaves no files without a manifest."""
    settings = merge_settings(tmp_path / "work", inputs)

    def stop(progress: Progress) -> None:
        if progress.stage == "Verifying":
            settings.stop.request("the pod was asked to stop (SIGTERM)")

    report = fail(inputs, replace(settings, on_progress=stop))
    assert (report.exit_code, report.reason, report.stage) == (25, "Preempted", "Verifying")


def test_a_killed_check_is_told_with_its_remedy(inputs: Bucket, tmp_path: Path) -> None:
    """The process that compares logits is killed, as the kernel does when memory runs out."""

    def kill(progress: Progress) -> None:
        if progress.message == "comparing logits with those of base and adapter":
            threading.Timer(1.0, end_children).start()

    settings = merge_settings(tmp_path / "work", inputs, on_progress=kill)
    report = fail(inputs, settings)
    assert (report.exit_code, report.reason) == (137, "Killed"), report.message
    assert "resources.memory" in report.message


def end_children() -> None:
    """Kill the processes of merge steps that this one started."""
    for child in psutil.Process().children():
        if "tunewright_trainer.merge" in " ".join(child.cmdline()):
            child.kill()


def test_a_merge_that_does_not_go_on(inputs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sign of progress for as long as retry.timeouts.stall says, the attempt ends."""

    def hang(*arguments: Any, **options: Any) -> MergeFindings:
        options["stop"].sleep(60)
        raise AssertionError

    monkeypatch.setattr(product, "merge", hang)
    report = fail(inputs, merge_settings(tmp_path / "work", inputs), stall="1s")
    assert (report.exit_code, report.reason) == (26, "Stalled")
    assert "no sign of progress for 1 s (retry.timeouts.stall) at stage Merging" in report.message


def test_a_full_disk(tmp_path: Path) -> None:
    """A volume that fills up while the merged model is written: exit code 20 with the remedy, nothing left there."""
    volume = tmp_path / "pvc" / "claim"
    write_base(volume / "base")
    write_adapter(volume / "adapter", "pvc://claim/base")
    small = volume / "out"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        document = merge_run(None, adapters=[{"uri": "pvc://claim/adapter"}], output={"uri": "pvc://claim/out"})
        report = supervisor.run(document, merge_settings(tmp_path / "work", pvc_root=tmp_path / "pvc"))
        assert [path for path in small.rglob("*") if path.is_file()] == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert (report.exit_code, report.reason) == (20, "DiskFull")
    assert report.message == "no space left at pvc://claim/out: free some, or write elsewhere"
