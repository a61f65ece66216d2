"""Target presets on layer names: what is chosen, and by which shortest names."""

from __future__ import annotations

import pytest

from tunewright_api.v1alpha1.method import TargetPreset
from tunewright_trainer.errors import InvalidConfiguration
from tunewright_trainer.targets import check_targets, resolve_preset

LLAMA = [
    f"model.layers.{n}.{name}"
    for n in range(2)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
GPT2 = [
    f"transformer.h.{n}.{name}" for n in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
CASES: dict[str, tuple[list[str], TargetPreset, list[str]]] = {
    "all linear layers of a Llama": (
        LLAMA, "AllLinear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    ),
    "attention of a Llama": (LLAMA, "Attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
    "queries and values of a Llama": (LLAMA, "QueryValue", ["q_proj", "v_proj"]),
    "one name in two places": (GPT2, "Attention", ["attn.c_proj", "c_attn"]),
    "one layer for query, key and value": (GPT2, "QueryValue", ["c_attn"]),
    "a name that ends another": (["a.attn.proj", "b.proj", "b.x.proj"], "Attention", ["attn.proj"]),
    "only the full name tells them apart": (["attn.out", "x.mlp.attn_out", "y.out"], "Attention", ["attn.out"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_preset(case: str) -> None:
    """A preset resolves to the shortest names that select its layers and no others."""
    layers, preset, expected = CASES[case]
    assert resolve_preset(preset, layers) == expected


@pytest.mark.parametrize("preset", ["Attention", "QueryValue"])
def test_preset_without_layers_is_refused(preset: TargetPreset) -> None:
    """A model whose attention is not known by name needs targetModules; the message lists what there is."""
    with pytest.raises(InvalidConfiguration, match=rf"{preset}.*targetModules, out of in_proj, mixer_out"):
        resolve_preset(preset, ["layers.0.mixer.in_proj", "layers.0.mixer.mixer_out"])


def test_targets_that_exist_are_kept() -> None:
    """Names, endings of names and full names all select layers."""
    targets = ["v_proj", "mlp.up_proj", "model.layers.1.self_attn.q_proj", "v_proj"]
    assert check_targets(targets, LLAMA) == sorted(set(targets))


@pytest.mark.parametrize("target", ["proj", "q_projx", "layers", "self_attn", "lm_head", ""])
def test_targets_that_select_nothing_are_refused(target: str) -> None:
    """Parts of names, modules that hold layers, and the output head are no targets."""
    with pytest.raises(InvalidConfiguration, match="no linear layer of the model is called"):
        check_targets(["q_proj", target], LLAMA)


def test_all_unknown_targets_are_named_at_once() -> None:
    """Every wrong name comes in one message, with the nearest right one."""
    with pytest.raises(InvalidConfiguration, match=r"names q_prj, w, which .*did you mean q_proj\?"):
        check_targets(["q_prj", "k_proj", "w"], LLAMA)
