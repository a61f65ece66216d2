"""Several adapters made one, against peft's own `add_weighted_adapter` on real models."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tunewright_api.v1alpha1.adaptermerge import CombinationType
from tunewright_trainer.errors import InvalidAdapter, InvalidConfiguration, TrainerError, WorkerFailure, fate_of
from tunewright_trainer.merge.combination import (
    AdapterFolder,
    Combination,
    CombineResult,
    CombineTask,
    run_combination,
)
from tunewright_trainer.merge.combine import combine, layer_seed
from tunewright_trainer.run_log import Redactor, RunLog

pytestmark = pytest.mark.timeout(300)

PEFT_TYPES = {
    "Linear": "linear", "Concatenate": "cat", "SVD": "svd", "TIES": "ties", "DARE": "dare_linear",
    "MagnitudePrune": "magnitude_prune",
}  # fmt: skip
EXACT = ("Linear", "Concatenate", "TIES", "DARE", "MagnitudePrune")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


def make_adapter(base: Path, folder: Path, *, seed: int, **config: Any) -> Path:
    """Save an adapter with random factors, tokenizer and chat template beside it."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 12, "target_modules": ALL, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**given, **config}))
    # Left to itself, peft saves the embeddings as well, but with a warning.
    model.save_pretrained(folder, save_embedding_layers="embed_tokens" in config.get("target_modules", ()))
    (folder / "tokenizer.json").write_text(json.dumps({"seed": seed}))
    (folder / "chat_template.jinja").write_text(f"template {seed}")
    return folder


def by_peft(
    base: Path, adapters: Sequence[Path], combination: Combination, monkeypatch: pytest.MonkeyPatch
) -> PeftModel:
    """Combine adapters in a loaded model; DARE draws from the seed of each layer, as we do."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="a0")
    for index, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, adapter_name=f"a{index}")
    names = {module: name for name, module in model.base_model.model.named_modules()}
    own = LoraModel._generalized_task_arithmetic_weighted_adapter

    def seeded(self: Any, kind: str, given: Any, weights: Any, target: Any, *more: Any) -> Any:
        torch.manual_seed(layer_seed(combination.seed, names[target]))
        return own(self, kind, given, weights, target, *more)

    monkeypatch.setattr(LoraModel, "_generalized_task_arithmetic_weighted_adapter", seeded)
    model.add_weighted_adapter(
        [f"a{index}" for index in range(len(adapters))],
        combination.weights,
        "one",
        combination_type=PEFT_TYPES[combination.type],
        density=combination.kept_share,
        svd_rank=combination.svd_rank,
    )
    model.set_adapter("one")
    return model


def task(
    tmp_path: Path, adapters: Sequence[Path], kind: CombinationType, weights: list[float], **more: Any
) -> CombineTask:
    """Return the task of combining adapters."""
    return CombineTask(
        adapters=[AdapterFolder(uri=f"s3://adapters/{path.name}", path=path) for path in adapters],
        combination=Combination(type=kind, weights=weights, **more),
        output=tmp_path / "one",
    )


def state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what peft would save of its combination."""
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name="one")
    return found


def change(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """Return B A of a layer."""
    return tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]


def layers_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the layers by the beginning of their tensors' names."""
    return sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], kind: CombinationType) -> None:
    """Compare tensor by tensor: bit by bit, or for SVD to rounding and up to the signs that it leaves open."""
    assert set(ours) == set(theirs)
    if kind != "SVD":
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        return
    for layer in layers_of(ours):
        a, b = ours[f"{layer}.lora_A.weight"], ours[f"{layer}.lora_B.weight"]
        their_a, their_b = theirs[f"{layer}.lora_A.weight"], theirs[f"{layer}.lora_B.weight"]
        sign = (a * their_a).sum(dim=1).sign()
        torch.testing.assert_close(a * sign[:, None], their_a, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b * sign, their_b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b @ a, their_b @ their_a, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens."""
    out: torch.Tensor = model(input_ids=torch.arange(1, 9)[None]).logits
    return out


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the same rank and layers."""
    folder = tmp_path_factory.mktemp("pair")
    return [make_adapter(tiny, folder / "first", seed=1), make_adapter(tiny, folder / "second", seed=2, lora_alpha=4)]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.25]])
@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_every_type_equals_peft(
    kind: CombinationType,
    weights: list[float],
    tiny: Path,
    pair: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Factor by factor, and the saved adapter gives the logits of peft's own combination."""
    given = task(tmp_path, pair, kind, weights)
    result = combine(given)
    model = by_peft(tiny, pair, given.combination, monkeypatch)
    assert_equal(load_file(given.output / WEIGHTS), state(model), kind)
    assert (result.rank, result.modules, result.partial) == (model.peft_config["one"].r, 14, {})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), given.output)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("Concatenate", 10), ("SVD", 6), ("SVD", 3)])
def test_adapters_of_all_sorts(
    kind: CombinationType, rank: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks, alphas, patterns and layers in each of three adapters: as peft, tensor by tensor."""
    adapters = [
        make_adapter(tiny, tmp_path / "a", seed=1, r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
        make_adapter(
            tiny, tmp_path / "b", seed=2, r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 6}, alpha_pattern={"layers.1.self_attn.q_proj": 7},
        ),
        make_adapter(tiny, tmp_path / "c", seed=3, r=2, lora_alpha=1, target_modules=["o_proj"]),
    ]  # fmt: skip
    more = {"svd_rank": rank} if kind == "SVD" and rank == 3 else {}
    given = task(tmp_path, adapters, kind, [0.5, 0.5, 2.0], **more)
    result = combine(given)
    ours, theirs = load_file(given.output / WEIGHTS), state(by_peft(tiny, adapters, given.combination, monkeypatch))
    assert result.rank == rank
    assert result.partial == {"s3://adapters/a": 4, "s3://adapters/b": 4, "s3://adapters/c": 6}
    assert set(ours) == set(theirs)
    for layer in layers_of(ours):
        torch.testing.assert_close(change(ours, layer), change(theirs, layer), atol=1e-6, rtol=1e-5)
        if kind == "Concatenate":
            assert torch.equal(ours[f"{layer}.lora_A.weight"], theirs[f"{layer}.lora_A.weight"])
    config = json.loads((given.output / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), given.output)


@pytest.mark.parametrize("kind", EXACT)
def test_layers_that_one_adapter_lacks(
    kind: CombinationType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds nothing there, as in peft."""
    adapters = [
        make_adapter(tiny, tmp_path / "a", seed=1, target_modules=["q_proj", "v_proj"]),
        make_adapter(tiny, tmp_path / "b", seed=2, target_modules=["q_proj", "up_proj"]),
    ]
    given = task(
        tmp_path, adapters, kind, [0.5, 0.8], density=0.3 if kind in ("TIES", "DARE", "MagnitudePrune") else None
    )
    combine(given)
    assert_equal(
        load_file(given.output / WEIGHTS), state(by_peft(tiny, adapters, given.combination, monkeypatch)), kind
    )


@pytest.mark.parametrize("kind", EXACT)
def test_rank_stabilised_adapters_keep_their_scale(
    kind: CombinationType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors are peft's. Peft's configuration keeps rsLoRA on, which scales them once more; ours does not."""
    adapters = [
        make_adapter(tiny, tmp_path / "a", seed=1, use_rslora=True, lora_alpha=3),
        make_adapter(tiny, tmp_path / "b", seed=2, use_rslora=True, lora_alpha=5),
    ]
    given = task(tmp_path, adapters, kind, [0.5, 0.8])
    combine(given)
    ours = load_file(given.output / WEIGHTS)
    assert_equal(ours, state(by_peft(tiny, adapters, given.combination, monkeypatch)), kind)
    config = json.loads((given.output / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (False, config["r"], config["r"])
    if kind == "Concatenate":
        originals = [load_file(adapter / WEIGHTS) for adapter in adapters]
        for layer in layers_of(ours):
            wanted = sum(
                weight * alpha / math.sqrt(4) * change(tensors, layer)
                for weight, alpha, tensors in zip([0.5, 0.8], [3, 5], originals, strict=True)
            )
            torch.testing.assert_close(change(ours, layer), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_transposed_layers(kind: CombinationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 keeps its weights transposed; the factors are combined all the same."""
    base = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(base)
    adapters = [
        make_adapter(base, tmp_path / name, seed=seed, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        for name, seed in (("a", 1), ("b", 2))
    ]
    given = task(tmp_path, adapters, kind, [0.6, 0.6])
    combine(given)
    model = by_peft(base, adapters, given.combination, monkeypatch)
    assert_equal(load_file(given.output / WEIGHTS), state(model), kind)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), given.output)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Linear", "Concatenate", "SVD"])
def test_adapters_of_embeddings(kind: CombinationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their factors are combined, and the embeddings that peft saves along come along."""
    base = tmp_path / "llama"
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(small).save_pretrained(base)
    adapters = [
        make_adapter(base, tmp_path / name, seed=seed, target_modules=["embed_tokens", "q_proj"])
        for name, seed in (("a", 1), ("b", 2))
    ]
    given = task(tmp_path, adapters, kind, [0.6, 0.6])
    combine(given)
    model = by_peft(base, adapters, given.combination, monkeypatch)
    ours = load_file(given.output / WEIGHTS)
    assert set(ours) == set(load_file(adapters[0] / WEIGHTS))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), given.output)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)

    path = adapters[1] / WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    save_file({**tensors, name: tensors[name] + 1}, path)
    other = given.model_copy(update={"output": tmp_path / "other"})
    with pytest.raises(InvalidAdapter, match=r"adapters/b has other values of .*embed_tokens.*cannot be combined"):
        combine(other)


def test_limits_to_some_layers_are_kept(tiny: Path, tmp_path: Path) -> None:
    """One adapter of the first layer, one of all: the result names every layer, and all of it is loaded."""
    adapters = [
        make_adapter(tiny, tmp_path / "a", seed=1, target_modules=["q_proj"], layers_to_transform=[0]),
        make_adapter(tiny, tmp_path / "b", seed=2, target_modules=r".*\.v_proj"),
    ]
    given = task(tmp_path, adapters, "Concatenate", [1.0, 1.0])
    combine(given)
    config = json.loads((given.output / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{layer}" for layer in (
        "0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"
    )]  # fmt: skip
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), given.output)
    assert set(get_peft_model_state_dict(loaded)) == set(load_file(given.output / WEIGHTS))


def test_the_same_seed_draws_the_same(pair: list[Path], tmp_path: Path) -> None:
    """Two runs give the same bytes; another seed does not."""
    given = task(tmp_path, pair, "DARE", [0.5, 0.5], seed=7)
    combine(given)
    first = (given.output / WEIGHTS).read_bytes()
    for seed, equal in ((7, True), (8, False)):
        combination = given.combination.model_copy(update={"seed": seed})
        again = given.model_copy(update={"output": tmp_path / str(seed), "combination": combination})
        combine(again)
        assert ((again.output / WEIGHTS).read_bytes() == first) is equal


def test_half_precision_adapters_are_combined_in_float32(pair: list[Path], tmp_path: Path) -> None:
    """Factors in bfloat16, as QLoRA has them, are added without rounding in between."""
    halves = []
    for folder in pair:
        half = tmp_path / folder.name
        half.mkdir()
        (half / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        save_file({name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}, half / WEIGHTS)
        halves.append(half)
    given = task(tmp_path, halves, "Concatenate", [0.5, 0.25])
    combine(given)
    ours, originals = load_file(given.output / WEIGHTS), [load_file(half / WEIGHTS) for half in halves]
    for layer in layers_of(ours):
        wanted = sum(
            s * change({n: t.float() for n, t in o.items()}, layer) for s, o in zip((1.5, 0.25), originals, strict=True)
        )
        torch.testing.assert_close(change(ours, layer), wanted, atol=1e-6, rtol=1e-5)


def test_tokenizer_and_template_are_the_first_adapters(pair: list[Path], tmp_path: Path) -> None:
    """They come along; the card and whatever else lies there does not."""
    given = task(tmp_path, pair, "Linear", [1.0, 1.0])
    combine(given)
    assert (given.output / "chat_template.jinja").read_text() == "template 1"
    assert sorted(path.name for path in given.output.iterdir()) == [
        "adapter_config.json", WEIGHTS, "chat_template.jinja", "tokenizer.json"
    ]  # fmt: skip


def damaged(folder: Path, how: str) -> None:
    """Damage an adapter."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    first = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))
    match how:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "a pickle":
            path.rename(path.with_name("adapter_model.bin"))
        case "not finite":
            tensors[first][0, 0] = math.nan
            save_file(tensors, path)
        case "half a layer":
            del tensors[first]
            save_file(tensors, path)
        case "another shape":
            save_file({**tensors, first: tensors[first][:2].contiguous()}, path)
        case "another model":
            other = torch.zeros(tensors[first].shape[0], 7)
            save_file({**tensors, first: other}, path)
        case "magnitudes":
            save_file({**tensors, first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)}, path)
        case "untrained":
            save_file({name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}, path)
        case "no configuration":
            (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("truncated", InvalidAdapter, "adapters/a/adapter_model.safetensors: damaged or truncated"),
        ("a pickle", InvalidAdapter, "adapters/a: no adapter_model.safetensors: the weights are a pickle"),
        ("not finite", InvalidAdapter, "adapters/a: model.layers.0.mlp.* has values that are no finite numbers"),
        ("half a layer", InvalidAdapter, "adapters/a: model.layers.0.mlp.* has only one of its two factors"),
        ("another shape", InvalidAdapter, r"have shapes \(2, \d+\) and .*those of a layer with rank 4 are"),
        ("another model", InvalidAdapter, "7 inputs and .*they are adapters of different models"),
        ("magnitudes", InvalidAdapter, "lora_magnitude_vector is no factor of a LoRA layer"),
        ("untrained", InvalidConfiguration, "Linear leaves nothing of the adapters"),
        ("no configuration", InvalidAdapter, "adapters/a/adapter_config.json: not valid JSON"),
    ],
)
def test_damaged_adapters(how: str, kind: type[TrainerError], message: str, tiny: Path, tmp_path: Path) -> None:
    """Each is refused by name, and nothing is written."""
    adapters = [make_adapter(tiny, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    for adapter in adapters if how == "untrained" else adapters[:1]:
        damaged(adapter, how)
    given = task(tmp_path, adapters, "Linear", [1.0, 1.0])
    with pytest.raises(kind, match=message):
        combine(given)
    assert not given.output.exists()


def test_in_a_process_of_its_own(pair: list[Path], tmp_path: Path) -> None:
    """The supervisor gets the result, and the process's own error when there is none."""
    with RunLog(tmp_path / "log", Redactor({}), echo=False) as log:
        given = task(tmp_path, pair, "TIES", [1.0, 1.0])
        result = run_combination(given, tmp_path, os.environ, log)
        assert isinstance(result, CombineResult)
        assert (result.rank, set(result.versions)) == (4, {"peft", "torch"})
        assert (given.output / WEIGHTS).is_file()
        damaged(pair[0], "not finite")
        with pytest.raises(WorkerFailure, match="no finite numbers") as caught:
            run_combination(given.model_copy(update={"output": tmp_path / "two"}), tmp_path, os.environ, log)
        assert fate_of(caught.value) == (20, "InvalidAdapter")
