"""Every method runs to Complete in a pod, from S3 to S3, and its result loads and gives the recorded logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Jobs, finetunejob
from tests.platform import DATASETS, MODELS, ROOT, SMOLLM2, TINY

VALIDATION = {
    "train": [{"uri": f"s3://{DATASETS}/docstrings/train.jsonl", "maxSamples": 64}],
    "validation": [{"uri": f"s3://{DATASETS}/docstrings/validation.jsonl", "maxSamples": 8}],
}
FLOAT32 = {"uri": f"s3://{MODELS}/{TINY}", "dtype": "Float32"}
METHODS = {
    "lora": {"type": "LoRA", "lora": {"rank": 4, "targets": "Attention"}},
    "qlora": {"type": "QLoRA", "lora": {"rank": 4}, "quantization": {"bits": 4}},
    "full": {"type": "Full"},
}
CLI = str(Path(sys.executable).parent / "tunewright")

LOAD_AND_COMPARE = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, base, probe_file, kind = sys.argv[1:5]
probe = load_file(probe_file)
if kind == "adapter":
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    logits_BV = model.eval()(probe["input_ids"]).logits[:, -1].float()
print(json.dumps({"difference": (logits_BV - probe["logits"]).abs().max().item()}))
"""


@pytest.mark.timeout(900)
def test_methods_run_to_complete(jobs: Jobs, tmp_path: Path) -> None:
    """LoRA, QLoRA and full fine-tuning publish verified results; the float32 ones give exactly the recorded logits."""
    documents = [
        finetunejob(f"method-{name}", model=FLOAT32, method=method, dataset=VALIDATION)
        for name, method in METHODS.items()
    ]
    jobs.apply(*documents)
    for name in METHODS:
        status = jobs.finished(f"method-{name}", timeout=600)
        assert status["phase"] == "Complete", status
        assert status["progress"]["step"] == 4
        assert status["evaluation"]["base"] > 0
        assert status["evaluation"]["tuned"] > 0
        assert status["output"]["uri"].endswith("/model" if name == "full" else "/adapter")
        assert {c["type"]: c["status"] for c in status["conditions"]} == {
            "Accepted": "True", "Suspended": "False", "PodsReady": "False", "Complete": "True", "Failed": "False",
            "Ready": "True", "Stalled": "False",
        }  # fmt: skip
    watched = jobs.platform.run(CLI, "watch", "method-lora", "-n", jobs.namespace)
    assert "Complete" in watched.stdout
    for name in ("lora", "full"):
        assert logit_difference(jobs, f"method-{name}", tmp_path) < 1e-4


def logit_difference(jobs: Jobs, name: str, tmp_path: Path) -> float:
    """Fetch a result as a user would, load it with plain peft or transformers, and compare with the recorded logits."""
    status = jobs.status(name)
    target = tmp_path / name
    fetched = jobs.platform.run(CLI, "get-adapter", name, str(target), "-n", jobs.namespace, "--output", "json")
    assert json.loads(fetched.stdout)["digest"] == status["output"]["digest"]
    root = Path(status["output"]["uri"]).name
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    client = jobs.platform.s3()
    for key in jobs.platform.keys(MODELS, "tiny-llama/"):
        client.download_file(MODELS, key, str(base / Path(key).name))
    probe = tmp_path / f"{name}-probe.safetensors"
    bucket, key = status["output"]["uri"].removeprefix("s3://").split("/", 1)
    client.download_file(bucket, f"{key.rpartition('/')[0]}/probe.safetensors", str(probe))
    command = [sys.executable, "-W", "ignore", "-c", LOAD_AND_COMPARE, str(target), str(base), str(probe), root]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(output.splitlines()[-1])["difference"])


@pytest.mark.timeout(1800)
def test_examples_improve_on_the_base_model(jobs: Jobs) -> None:
    """The examples, side by side, train SmolLM2-135M to a lower loss than the base model's; one is merged as well."""
    names = {}
    merge = yaml.safe_load((ROOT / "examples" / "merge-gguf.yaml").read_text())
    merge["spec"]["output"]["uri"] = f"s3://{MODELS}/e2e/merge-gguf"
    merge["spec"]["resources"]["cpu"] = "500m"
    jobs.apply(merge)
    for example in ("sft-lora", "sft-qlora", "sft-full"):
        document = yaml.safe_load((ROOT / "examples" / f"{example}.yaml").read_text())
        assert document["spec"]["model"]["uri"].endswith(SMOLLM2)
        document["spec"]["output"]["uri"] = f"s3://{MODELS}/e2e/{example}"
        document["spec"]["resources"]["cpu"] = "500m"  # so that they fit onto one small node together
        jobs.apply(document)
        names[example] = document["metadata"]["name"]
    for example, name in names.items():
        status = jobs.finished(name, timeout=1200)
        assert status["phase"] == "Complete", status
        assert status["evaluation"]["improvement"] > 0.1
        assert jobs.platform.keys(MODELS, f"e2e/{example}/latest.json")
    merged = jobs.finished(merge["metadata"]["name"], kind="am", timeout=600)
    assert merged["phase"] == "Complete", merged
    assert merged["verification"]["passed"]
    assert merged["output"]["ggufUris"][0].endswith("docstrings-merged-Q8_0.gguf")


@pytest.mark.timeout(600)
def test_the_same_run_again_is_answered_from_storage(jobs: Jobs) -> None:
    """A FineTuneJob with the content of a published one completes with reason Cached and trains nothing."""
    jobs.apply(finetunejob("cached-first"))
    first = jobs.finished("cached-first")
    again = finetunejob("cached-second")
    again["spec"]["output"] = {"uri": f"s3://{MODELS}/e2e/cached-first"}
    jobs.apply(again)
    second = jobs.finished("cached-second")
    complete = next(c for c in second["conditions"] if c["type"] == "Complete")
    assert complete["reason"] == "Cached"
    assert second["output"] == first["output"]
