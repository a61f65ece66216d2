"""Whether vLLM serves an adapter beside its base model, from the adapter's configuration and the names of its tensors.

What is checked is what vLLM's loader refuses (`vllm/lora/peft_helper.py`, `lora_model.py`), and what its released
versions take without a word and then compute differently from peft.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright_api.v1alpha1.adaptermerge import DEFAULT_MAX_LORA_RANK
from tunewright_trainer import model_files
from tunewright_trainer.errors import InvalidAdapter, InvalidConfiguration, InvalidModel
from tunewright_trainer.merge.combination import changes_base, highest_rank, lowest_rank, rank_and_scale

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be."""
_LORA_TENSOR = re.compile(r"(base_model\.model\.)?(?P<layer>.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
_IGNORED_TENSORS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Base weights that peft saves beside the factors of embeddings; vLLM passes over them."""
_MERGE = "merge the adapter into its base model and serve that"
_UNSUPPORTED = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "biases in LoRA layers (lora_bias)",
    "trainable_token_indices": "embeddings of single tokens (trainable_token_indices)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "LoRA that acts from certain tokens on (alora_invocation_tokens)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
}


@dataclass(frozen=True)
class VllmReport:
    """What vLLM would say of an adapter."""

    compatible: bool
    problems: tuple[str, ...]
    """One sentence each, with what to do about it; empty when it is compatible."""
    max_lora_rank_needed: int | None
    """Smallest --max-lora-rank that the adapter fits in; None: none does, or it is no LoRA adapter."""


def check_folder(folder: Path, max_lora_rank: int = DEFAULT_MAX_LORA_RANK) -> VllmReport:
    """Check an adapter on disk; see `check_adapter`.

    Raises:
        InvalidAdapter: The folder holds no adapter, or a damaged one.
        InvalidConfiguration: vLLM has no such limit.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_bytes())
        tensors = model_files.read_header(str(folder), folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise InvalidAdapter(
            f"{folder}: no {Path(error.filename).name}: this is not the folder of an adapter"
        ) from None
    except InvalidModel as error:
        raise InvalidAdapter(str(error)) from None
    except ValueError as error:
        raise InvalidAdapter(f"{path}: not valid JSON: {error}") from None
    return check_adapter(config, tensors, max_lora_rank)


def check_adapter(
    config: Mapping[str, Any], tensors: Iterable[str], max_lora_rank: int = DEFAULT_MAX_LORA_RANK
) -> VllmReport:
    """Check an adapter.

    Args:
        config: Content of adapter_config.json.
        tensors: Names of its tensors.
        max_lora_rank: The limit that vLLM is started with (--max-lora-rank). Default: vLLM's own.

    Raises:
        InvalidConfiguration: vLLM has no such limit.
    """
    if max_lora_rank not in MAX_LORA_RANKS:
        allowed = ", ".join(map(str, MAX_LORA_RANKS))
        raise InvalidConfiguration(f"verification.vllm.maxLoraRank is {max_lora_rank}: vLLM knows {allowed}")
    kind = config.get("peft_type")
    if kind != "LORA":
        return VllmReport(False, (f"vLLM serves LoRA adapters only, this one is of kind {kind!r}: {_MERGE}",), None)
    if lowest_rank(config) < 1:
        return VllmReport(False, (f"rank {lowest_rank(config)}: vLLM takes positive ones",), None)
    names, rank = list(tensors), highest_rank(config)
    needed = next((limit for limit in MAX_LORA_RANKS if limit >= rank), None)
    problems = [
        *_rank_problems(rank, needed, max_lora_rank),
        *_feature_problems(config),
        *_scale_problems(config, names),
        *_tensor_problems(names),
    ]
    return VllmReport(not problems, tuple(problems), needed)


def _rank_problems(rank: int, needed: int | None, limit: int) -> list[str]:
    if needed is None:
        return [f"rank {rank} is more than {MAX_LORA_RANKS[-1]}, the most that vLLM serves: {_MERGE}"]
    if rank > limit:
        return [f"rank {rank} is more than maxLoraRank {limit}: start vLLM with --max-lora-rank {needed}"]
    return []


def _feature_problems(config: Mapping[str, Any]) -> list[str]:
    found = [text for key, text in _UNSUPPORTED.items() if config.get(key)]
    if config.get("modules_to_save"):
        found.append(f"whole trained modules (modules_to_save {', '.join(config['modules_to_save'])})")
    if config.get("bias", "none") != "none":
        found.append(f"trained biases (bias {config['bias']!r})")
    if changes_base(config):
        found.append(f"a changed base model (init_lora_weights {config['init_lora_weights']!r})")
    problems = [f"vLLM does not serve {text}: {_MERGE}" for text in found]
    if not config.get("target_modules"):
        problems.append("the configuration has no target_modules, which vLLM requires: set them to the trained layers")
    return problems


def _scale_problems(config: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Count the layers whose scale is not that of the adapter: vLLM may take that one for all."""
    layers = {found["layer"] for name in tensors if (found := _LORA_TENSOR.fullmatch(name))}
    own = rank_and_scale({**config, "rank_pattern": {}, "alpha_pattern": {}}, "")[1]
    others = [layer for layer in layers if not math.isclose(rank_and_scale(config, layer)[1], own)]
    if not others:
        return []
    return [
        f"rank_pattern or alpha_pattern give {len(others)} of {len(layers)} layers another scale than {own:g}, which "
        f"most versions of vLLM apply to all of them without a word: {_MERGE}"
    ]


def _tensor_problems(tensors: Iterable[str]) -> list[str]:
    unknown = sorted(
        name for name in tensors if not _LORA_TENSOR.fullmatch(name) and not name.endswith(_IGNORED_TENSORS)
    )
    if not unknown:
        return []
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return [f"vLLM loads no tensors such as {', '.join(unknown[:3])}{more}: {_MERGE}"]
