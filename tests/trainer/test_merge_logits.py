"""The check that a merged model is base and adapter: what is honest passes, and each way to get it wrong is caught."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tests.trainer.kit import Bucket
from tests.trainer.merge_kit import IDS, KINDS, Case, load, make_base, merge_folders, run_case
from tests.trainer.s3_fixtures import bucket, server, shared_bucket, storage
from tunewright_api.run_config import StorageSettings
from tunewright_trainer.errors import InvalidAdapter, InvalidModel, VerificationFailed, WorkerFailure
from tunewright_trainer.merge.changes import BaseQuantization
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.lazy_model import LazyWeights, attach, build_empty
from tunewright_trainer.merge.logit_check import check, run
from tunewright_trainer.merge.readers import FolderReader
from tunewright_trainer.merge.verification import Location, LogitsTask, run_logits_check
from tunewright_trainer.run_log import Redactor, RunLog
from tunewright_trainer.storage import Storage

__all__ = ["bucket", "server", "shared_bucket", "storage"]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = ("Float32", "BFloat16")
PROCESS = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HF_HUB_OFFLINE") if name in os.environ}
"""Environment of a process, without credentials."""
Change = Callable[[dict[str, torch.Tensor], "Case"], None]


def lora(targets: Any = LINEAR, **changes: Any) -> LoraConfig:
    """Build a LoRA configuration."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets, **changes})


def task_of(case: Case, **changes: Any) -> LogitsTask:
    """Build the task of checking a case's merge."""
    places = {"base": Location(uri="the base", path=case.base), "merged": Location(uri="the result", path=case.merged)}
    return LogitsTask(**{**places, "adapter": case.adapter, **changes})


HONEST: dict[str, tuple[str, PeftConfig]] = {
    "lora": ("llama", lora()),
    "dora": ("llama", lora(use_dora=True)),
    "embedding": ("llama", lora(["embed_tokens", "q_proj"])),
    "tied-embedding": ("qwen2", lora(["embed_tokens", "q_proj"])),
    "tied": ("qwen2", lora()),
    "untied-by-head": ("qwen2", lora(["q_proj"], modules_to_save=["lm_head"])),
    "tokens": ("qwen2", lora(["q_proj"], trainable_token_indices=[3, 47])),
    "bias": ("llama", lora(["q_proj"], bias="all")),
    "ia3": (
        "llama",
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "gpt2": ("gpt2", lora(["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "experts": ("mixtral", lora(["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
}


@pytest.mark.parametrize("dtype", [*DTYPES, "Float16"])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_merge_passes(tmp_path: Path, name: str, dtype: str) -> None:
    """Whatever the adapter, the merged model differs from base and adapter by rounding alone, and shows its effect."""
    base, config = HONEST[name]
    case = run_case(make_base(tmp_path / "base", base), tmp_path, config, dtype=dtype)
    outcome = check(task_of(case))
    assert outcome.deviation <= outcome.allowed_deviation / 4
    # Rounding sends a token to another expert: peft's rounded merge does the same, so that nothing more is allowed.
    turned = (name, dtype) == ("experts", "BFloat16")
    assert outcome.max_divergence <= outcome.allowed_divergence / (1 if turned else 2)
    assert outcome.mean_kl < 1e-3
    assert outcome.effect > (2 if turned else 3) * outcome.max_divergence
    assert (outcome.rounding > 0) == (dtype != "Float32")
    assert (outcome.prompts, outcome.tokens, outcome.notes) == (6, 6 * 48, [])


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_classifier(tmp_path: Path, family: str, dtype: str) -> None:
    """The logits of a head that the base does not have are compared as well."""
    base = make_base(tmp_path / "base", family, "SEQ_CLS" if family == "bert" else "CAUSAL_LM")
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"] if family == "bert" else LINEAR)
    case = run_case(base, tmp_path, config, "SEQ_CLS", settings={"num_labels": 2}, dtype=dtype, outputs=["bad", "good"])
    outcome = check(task_of(case))
    assert outcome.architecture.endswith("ForSequenceClassification")
    assert outcome.deviation <= outcome.allowed_deviation / 4
    assert outcome.effect > 10 * outcome.max_divergence


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_layer_by_layer_gives_the_same_numbers(tmp_path: Path, family: str) -> None:
    """A model that reads its weights when they are needed computes what from_pretrained's does, to the last bit."""
    base = make_base(tmp_path / "base", family)
    model = build_empty(KINDS["CAUSAL_LM"], AutoConfig.from_pretrained(base))
    attach(model, LazyWeights(model, Checkpoint(FolderReader(base))))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(run(model, IDS), run(load(base), IDS))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.fixture(scope="module", params=DTYPES)
def merge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An adapter of little effect, merged as it should be."""
    folder = tmp_path_factory.mktemp("merge")
    base = make_base(folder / "base", "llama")
    case = run_case(base, folder, lora(), dtype=request.param)
    weights = load_file(case.adapter / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name] *= 0.05
    save_file(weights, case.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(case.merged)
    merge_folders(base, case.adapter, case.merged, dtype=request.param)
    return case


def wrong(case: Case, target: Path, change: Change) -> Case:
    """Copy a merge, with its tensors changed."""
    shutil.copytree(case.merged, target)
    weights = load_file(target / "model.safetensors")
    change(weights, case)
    save_file({n: t.contiguous() for n, t in weights.items()}, target / "model.safetensors", metadata={"format": "pt"})
    return Case(case.base, case.adapter, target, case.kind, case.adapted_logits, case.reference, case.findings)


def base_of(case: Case, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Load the base's tensors in another's number format."""
    return {name: tensor.to(like.dtype) for name, tensor in load_file(case.base / "model.safetensors").items()}


def from_base(weights: dict[str, torch.Tensor], case: Case, part: str) -> None:
    """Put the base's tensors in the place of those with a part of a name."""
    plain = base_of(case, next(iter(weights.values())))
    weights.update({name: plain[name] for name in weights if part in name})


def transpose(weights: dict[str, torch.Tensor], case: Case) -> None:
    """Add A B in the place of B A to a square matrix."""
    name = "model.layers.1.self_attn.q_proj.weight"
    plain = base_of(case, weights[name])[name]
    weights[name] = plain + (weights[name] - plain).T


def exchange(weights: dict[str, torch.Tensor], case: Case) -> None:
    """Add what belongs to one layer to another one."""
    first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in range(2))
    plain = base_of(case, weights[first])
    one, other = weights[first] - plain[first], weights[second] - plain[second]
    weights[first], weights[second] = plain[first] + other, plain[second] + one


def break_number(weights: dict[str, torch.Tensor], case: Case) -> None:
    """Put in what is no number."""
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")


SABOTAGES: dict[str, tuple[Change, str]] = {
    "nothing merged": (lambda w, c: from_base(w, c, ""), "as if the adapter had not been applied.*layers"),
    "layer skipped": (lambda w, c: from_base(w, c, "layers.1."), r"those differ most: model\.layers\.1\..*and 4 more"),
    "matrix skipped": (
        lambda w, c: from_base(w, c, "layers.0.self_attn.k_proj.weight"),
        r"those differ most: model\.layers\.0\.self_attn\.k_proj\.weight; nothing",
    ),
    "factors swapped": (transpose, r"those differ most: model\.layers\.1\.self_attn\.q_proj\.weight; nothing"),
    "other layer": (exchange, r"differ most: model\.layers\.[01]\.mlp\.up_proj\.weight, model\.layers\.[01]\.mlp\.up_"),
    "no number": (break_number, r"no numbers; .*: model\.layers\.0\.mlp\.up_proj\.weight; nothing is published"),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_wrong_tensors_are_caught_and_named(merge: Case, tmp_path: Path, name: str) -> None:
    """What is not base and adapter fails, even where 16 bits round away a good part of the effect."""
    change, message = SABOTAGES[name]
    with pytest.raises(VerificationFailed, match=message):
        check(task_of(wrong(merge, tmp_path / "wrong", change)))


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_wrong_scale_is_caught_and_measured(merge: Case, tmp_path: Path, factor: float) -> None:
    """An alpha taken for another one fails, and the message says how strongly the adapter acts."""
    shutil.copytree(merge.adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "lora_alpha": config["lora_alpha"] * factor})
    )
    dtype = "BFloat16" if merge.config()["dtype"] == "bfloat16" else "Float32"
    merge_folders(merge.base, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    shown = rf"it shows ({factor - 0.2:.1f}|{factor - 0.1:.1f}|{factor:.1f})\d of the adapter's effect"
    with pytest.raises(VerificationFailed, match=shown):
        check(task_of(merge, merged=Location(uri="the result", path=tmp_path / "merged")))


def test_another_base_is_caught(merge: Case, tmp_path: Path) -> None:
    """A merge into other weights of the same shapes fails."""
    other = make_base(tmp_path / "other", "llama")
    weights = load_file(other / "model.safetensors")
    save_file({n: t * 1.01 for n, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    merge_folders(other, merge.adapter, tmp_path / "merged", dtype="Float32")
    with pytest.raises(VerificationFailed, match="does not give the logits of base and adapter"):
        check(task_of(merge, merged=Location(uri="the result", path=tmp_path / "merged")))


def test_an_effect_that_rounding_hides_is_said(merge: Case, tmp_path: Path) -> None:
    """Where the adapter moves logits less than the check can see, the outcome says so and how to see more."""
    shutil.copytree(merge.adapter, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    faint = {name: tensor * 1e-4 if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(faint, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    merge_folders(merge.base, tmp_path / "adapter", tmp_path / "merged", dtype="BFloat16")
    merged = Location(uri="the result", path=tmp_path / "merged")
    outcome = check(task_of(merge, adapter=tmp_path / "adapter", merged=merged))
    assert outcome.effect <= outcome.allowed_deviation
    assert "give verification.prompts of the kind that it was trained on" in outcome.notes[0]


def test_a_limit_of_the_users_own(merge: Case) -> None:
    """verification.maxDivergence takes the place of what rounding may explain."""
    honest = check(task_of(merge))
    assert check(task_of(merge, max_divergence=honest.max_divergence * 2)).allowed_divergence == (
        honest.max_divergence * 2
    )
    with pytest.raises(VerificationFailed, match=r"or raise verification\.maxDivergence"):
        check(task_of(merge, max_divergence=honest.max_divergence / 2))


def drop(weights: dict[str, torch.Tensor], case: Case) -> None:
    """Forget a tensor."""
    del weights["model.layers.1.mlp.down_proj.weight"]


def add(weights: dict[str, torch.Tensor], case: Case) -> None:
    """Leave a factor of the adapter in the files."""
    weights["model.layers.1.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 48)


def cut(weights: dict[str, torch.Tensor], case: Case) -> None:
    """Lose the last rows of a tensor."""
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"][:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"lack parameters.*: model\.layers\.1\.mlp\.down_proj\.weight; nothing is published"),
        (add, r"no use for: model\.layers\.1\.mlp\.down_proj\.lora_A\.weight; nothing is published"),
        (cut, r"other shapes.*: model\.layers\.1\.mlp\.down_proj\.weight; nothing is published"),
    ],
)
def test_files_that_transformers_cannot_use_whole(merge: Case, tmp_path: Path, change: Change, message: str) -> None:
    """What would be drawn at random, left out or refused when the model is loaded is named."""
    with pytest.raises(VerificationFailed, match=message):
        check(task_of(wrong(merge, tmp_path / "wrong", change)))


def test_a_configuration_of_another_class(tmp_path: Path) -> None:
    """A classifier whose config.json still says language model would be loaded without its head."""
    base = make_base(tmp_path / "base", "llama")
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=LINEAR)
    case = run_case(base, tmp_path, config, "SEQ_CLS", settings={"num_labels": 2})
    path = case.merged / "config.json"
    path.write_text(json.dumps({**case.config(), "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(VerificationFailed, match="names the class LlamaForCausalLM, but the adapter is one of Llama"):
        check(task_of(case))


def test_an_adapter_of_another_model(merge: Case, tmp_path: Path) -> None:
    """It is the adapter that is to blame, not the merge."""
    base = make_base(tmp_path / "base", "gpt2")
    with pytest.raises(InvalidAdapter, match="the adapter does not fit the base model"):
        check(task_of(merge, base=Location(uri="gpt2", path=base), merged=Location(uri="gpt2", path=base)))


def test_a_base_without_what_the_adapter_was_trained_on(tmp_path: Path) -> None:
    """A pooler that the base drew at random in training is neither in the base nor in the adapter."""
    base = make_base(tmp_path / "base", "bert", "MASKED_LM")
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    whole = make_base(tmp_path / "whole", "bert", "SEQ_CLS")
    case = run_case(whole, tmp_path, config, "SEQ_CLS", settings={"num_labels": 2})
    with pytest.raises(InvalidModel, match=r"bert lacks parameters that the adapter needs: bert\.pooler"):
        check(task_of(case, base=Location(uri="bert", path=base)))


@pytest.mark.parametrize("kind", ["NF4", "FP4"])
def test_a_dequantized_base(tmp_path: Path, kind: Any) -> None:
    """A merge into the base as it was in 4 bits is compared with that base, which bitsandbytes quantizes by itself."""
    base = make_base(tmp_path / "base", "llama")
    how = BaseQuantization(type=kind)
    case = run_case(base, tmp_path, lora(["q_proj", "down_proj", "lm_head"]), dequantized=how)
    outcome = check(task_of(case, dequantized=how))
    assert outcome.deviation <= outcome.allowed_deviation / 4
    with pytest.raises(VerificationFailed, match="does not give the logits of base and adapter"):
        check(task_of(case))


@pytest.fixture
def chat(tiny: Path, tmp_path: Path) -> Case:
    """A merge of a chat model, with tokenizer and template."""
    return run_case(tiny, tmp_path, lora(["q_proj"]), dtype="BFloat16")


def test_prompts_go_through_tokenizer_and_chat_template(chat: Case) -> None:
    """The user's prompts come on top of the built-in ones, asked as turns of a conversation."""
    outcome = check(task_of(chat, prompts=["What is the capital of France?"]))
    assert (outcome.has_chat_template, outcome.prompts, outcome.architecture) == (True, 7, "LlamaForCausalLM")
    assert outcome.deviation <= outcome.allowed_deviation / 4


def lose_template(merged: Path) -> None:
    """Forget the chat template."""
    (merged / "chat_template.jinja").unlink()


def change_template(merged: Path) -> None:
    """Put in another one."""
    (merged / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def lose_tokenizer(merged: Path) -> None:
    """Forget the tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (merged / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lose_template,
            r"chat template \(chat_template\) of the base is lost: the merged model has none; nothing",
        ),
        (
            change_template,
            r"chat template \(chat_template\) of the base is another one in the merged model; nothing",
        ),
        (lose_tokenizer, "the tokenizer of the base is lost: the merged model has none; nothing is published"),
    ],
)
def test_a_lost_tokenizer_or_template_is_caught(chat: Case, change: Callable[[Path], None], message: str) -> None:
    """A model that answers in another format than it was trained in is not published."""
    change(chat.merged)
    with pytest.raises(VerificationFailed, match=message):
        check(task_of(chat))


def test_memory_is_that_of_the_largest_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with many layers no more is in memory at any time than one of them, or embedding or head."""
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1000}
    layers = LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, tie_word_embeddings=False, **size))
    layers.save_pretrained(tmp_path / "base")
    total = sum(parameter.numel() for parameter in layers.parameters()) * 4
    layer = sum(parameter.numel() for parameter in layers.model.layers[0].parameters()) * 4
    case = run_case(tmp_path / "base", tmp_path, lora(), dtype="BFloat16", max_shard_bytes=1_000_000)
    alive, peak = 0, 0

    def read(self: LazyWeights, name: str) -> torch.Tensor:
        nonlocal alive, peak
        tensor = original(self, name)
        alive += tensor.nbytes
        peak = max(peak, alive)

        def gone(nbytes: int) -> None:
            nonlocal alive
            alive -= nbytes

        weakref.finalize(tensor.untyped_storage(), gone, tensor.nbytes)
        return tensor

    original = LazyWeights._read
    monkeypatch.setattr(LazyWeights, "_read", read)
    check(task_of(case))
    assert 0.9 * layer <= peak <= 1.5 * layer < total / 6
    assert alive == 0


@pytest.mark.parametrize("merge", ["BFloat16"], indirect=True)
def test_from_storage_in_a_process_of_its_own(merge: Case, tmp_path: Path, bucket: Bucket, storage: Storage) -> None:
    """Base and merged files are read from S3 in pieces; the process has the credentials for it."""
    for folder, prefix in ((merge.base, "base"), (merge.merged, "out/merged")):
        for path in folder.iterdir():
            bucket.put(f"{prefix}/{path.name}", path.read_bytes())
    places = {
        name: Location(uri=f"s3://{bucket.name}/{key}", files=storage.listing(f"s3://{bucket.name}/{key}"))
        for name, key in (("base", "base"), ("merged", "out/merged"))
    }
    settings = StorageSettings(endpoint=bucket.server.endpoint, path_style=True, secret_name="s3-credentials")
    task = task_of(merge, **places, storage=settings)
    with RunLog(tmp_path / "log", Redactor({}), echo=False) as log:
        outcome = run_logits_check(task, tmp_path, {**PROCESS, **bucket.environment}, log)
    here = check(task_of(merge))
    assert outcome.model_copy(update={"seconds": 0, "peak_memory_bytes": 0}) == here.model_copy(
        update={"seconds": 0, "peak_memory_bytes": 0}
    )


@pytest.mark.parametrize("merge", ["BFloat16"], indirect=True)
def test_a_failure_in_the_process_comes_back(merge: Case, tmp_path: Path) -> None:
    """Reason and message are those of the check."""
    task = task_of(wrong(merge, tmp_path / "wrong", drop))
    with RunLog(tmp_path / "log", Redactor({}), echo=False) as log, pytest.raises(WorkerFailure) as failure:
        run_logits_check(task, tmp_path, PROCESS, log)
    assert failure.value.worker_reason == "VerificationFailed"
    assert "down_proj.weight; nothing is published" in str(failure.value)
