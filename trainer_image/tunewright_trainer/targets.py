"""Which layers an adapter goes on: target presets resolved against the names of the layers a model really has."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from tunewright_api.v1alpha1.method import TargetPreset
from tunewright_trainer.errors import InvalidConfiguration

QUERY_VALUE_NAMES = frozenset(
    {
        *("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, GPT-J, Phi-1 and Phi-2
        *("query", "value"),  # BERT, RoBERTa
        *("query_proj", "value_proj"),  # DeBERTa
        *("q_lin", "v_lin"),  # DistilBERT
        *("q", "v"),  # T5
        *("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "W_pack"),  # one layer for query, key and value:
        # GPT-2, Falcon and GPT-NeoX and BLOOM, Phi-3, others, MPT, Baichuan
    }
)
"""Names of the layers that make queries and values. Only this preset needs names: which layers are linear and which
stand inside attention can be seen in the model."""


def resolve_preset(preset: TargetPreset, layers: Sequence[str]) -> list[str]:
    """Return target names, as short as they can be, that select a preset's layers and no others.

    Args:
        preset: AllLinear, Attention (layers below a module named after attention) or QueryValue.
        layers: Full names of the model's linear layers.

    Raises:
        InvalidConfiguration: The model has no such layers.
    """
    if preset == "AllLinear":
        chosen = list(layers)
    else:
        chosen = [name for name in layers if any("att" in part.lower() for part in name.split(".")[:-1])]
        if preset == "QueryValue":
            chosen = [name for name in chosen if name.rpartition(".")[2] in QUERY_VALUE_NAMES]
    if not chosen:
        raise InvalidConfiguration(
            f"lora.targets is {preset}, but the model has no layers known as such: "
            f"name them in lora.targetModules, out of {_names(layers)}"
        )
    others = set(layers) - set(chosen)
    return sorted({_shortest_name(name, others) for name in chosen})


def check_targets(targets: Sequence[str], layers: Sequence[str], field: str = "lora.targetModules") -> list[str]:
    """Return the targets when each one is the name, or the end of the name, of a linear layer.

    Args:
        targets: What the spec names.
        layers: Full names of the model's linear layers.
        field: Where the spec names them.

    Raises:
        InvalidConfiguration: Naming every target that is not, the nearest name, and the layers there are.
    """
    unknown = [target for target in targets if not any(_selects(target, name) for name in layers)]
    if not unknown:
        return sorted(set(targets))
    known = sorted({name.rpartition(".")[2] for name in layers})
    nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise InvalidConfiguration(
        f"{field} names {', '.join(unknown)}, which no linear layer of the model is called{hint}: "
        f"the model has {_names(layers)}; its output head takes no adapter"
    )


def check_modules(modules: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the modules to save when each one is the name, or the end of the name, of a module.

    Raises:
        InvalidConfiguration: Naming every one that is not, and the nearest name.
    """
    unknown = [module for module in modules if not any(_selects(module, name) for name in known)]
    if not unknown:
        return sorted(set(modules))
    names = sorted({name.rpartition(".")[2] for name in known if name and not name.rpartition(".")[2].isdigit()})
    nearest = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise InvalidConfiguration(
        f"lora.modulesToSave names {', '.join(unknown)}, which no module of the model is called{hint}: "
        f"the model has {', '.join(names)}"
    )


def _selects(target: str, name: str) -> bool:
    """Tell whether peft applies a target name to a layer."""
    return name == target or name.endswith("." + target)


def _shortest_name(name: str, others: Collection[str]) -> str:
    """Return the shortest ending of a name that selects none of the other layers."""
    parts = name.split(".")
    endings = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next(ending for ending in endings if not any(_selects(ending, other) for other in others))


def _names(layers: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
