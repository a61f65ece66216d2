"""The tensors of a merged model: where each comes from and what is done to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tunewright_trainer.errors import InvalidAdapter
from tunewright_trainer.merge.adapter import Adapter, equal_tensors
from tunewright_trainer.merge.changes import HEADS, BaseQuantization, Change, Changes
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.edits import Edit, Rows
from tunewright_trainer.merge.numbers import FLOATS, ITEM_BYTES
from tunewright_trainer.merge.sources import Source, sources_of

_WITHOUT_TOKENS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""Tasks whose models have no output head over the vocabulary."""
_TOKEN_HEADS = ("lm_head", "cls", "embed_out", "vocab_transform", "vocab_layer_norm", "vocab_projector", "predictions")
"""Modules at the top of files that only models over tokens have."""
_HEADS_OF_ARCHITECTURES = {
    "BertForMaskedLM": "cls.predictions.decoder.weight",
    "RobertaForMaskedLM": "lm_head.decoder.weight",
    "XLMRobertaForMaskedLM": "lm_head.decoder.weight",
}

Kind = Literal["Copied", "Delta", "Replaced", "Added"]


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model."""

    name: str
    kind: Kind
    """Taken over, changed by a delta, replaced by the adapter's, or one that the base does not have."""
    source: Source
    dtype: str
    """Number format that it keeps unless all get another: the base's."""
    base: Source | None = None
    """The base's, where the adapter's takes its place and both have the same shape."""
    edits: tuple[Edit, ...] = ()
    rows: int | None = None
    """Rows of the matrix that the edits see. Default: all dimensions but the last."""


@dataclass(frozen=True)
class Plan:
    """A merged model before its weights are computed."""

    tensors: tuple[MergedTensor, ...]
    dropped: tuple[str, ...]
    """Tensors of the base that a model of the adapter's task does not have."""
    config: dict[str, Any] = field(repr=False)
    """What the merged model's configuration has in other values than the base's."""


def plan_merge(base: Checkpoint, adapter: Adapter, dequantized: BaseQuantization | None) -> Plan:
    """Work out what becomes of every tensor; nothing large is read.

    Raises:
        InvalidAdapter: The adapter is not one of this base, or does what is not supported.
        InvalidModel: The base is quantized in a way that is not read here.
    """
    sources = sources_of(base)
    model_type = str(base.config.get("model_type"))
    changes = Changes(sources, model_type, adapter, dequantized, base.reader.uri)
    has_token_head = adapter.config.get("task_type") not in _WITHOUT_TOKENS
    config: dict[str, Any] = {}
    extra: dict[str, MergedTensor] = {}
    if has_token_head:
        extra = _tie(base, adapter, sources, changes, config)
    dropped = [] if has_token_head else [name for name in sources if name.partition(".")[0] in _TOKEN_HEADS]
    usual = Counter(source.dtype for source in sources.values() if source.dtype in FLOATS).most_common(1)
    tensors = {name: MergedTensor(name, "Copied", source, source.dtype) for name, source in sources.items()}
    tensors.update({n: _merged(n, change, usual[0][0] if usual else "F32") for n, change in changes.by_tensor.items()})
    tensors.update(extra)
    for name in dropped:
        if name in changes.by_tensor:
            raise InvalidAdapter(
                f"{adapter.uri}: it changes {name}, which a model for {adapter.config['task_type']} does not have"
            )
        del tensors[name]
    _check_vocabulary(adapter, changes, tensors, config)
    return Plan(tuple(tensors.values()), tuple(dropped), config)


def _merged(name: str, change: Change, usual: str) -> MergedTensor:
    base, replacement, edits = change.base, change.replacement, tuple(change.edits)
    dtype = base.dtype if base is not None else usual
    if replacement is None:
        return MergedTensor(name, "Delta", change.source, dtype, None, edits, change.rows)
    comparable = base if base is not None and base.shape == replacement.shape else None
    kind: Kind = "Replaced" if base is not None else "Added"
    return MergedTensor(name, kind, replacement, dtype, comparable, edits, change.rows)


def _tie(
    base: Checkpoint, adapter: Adapter, sources: dict[str, Source], changes: Changes, config: dict[str, Any]
) -> dict[str, MergedTensor]:
    """Decide whether input embedding and output head stay one tensor.

    They do where the adapter changes both alike, or none; else the head gets a tensor of its own.
    """
    text = base.config.get("text_config") or {}
    flag = text.get("tie_word_embeddings", base.config.get("tie_word_embeddings"))
    embedding = changes.embedding
    head = next((name for name in HEADS if name in changes.by_tensor or name in sources), None)
    if embedding is None or flag is False or (flag is None and head in sources):
        return {}
    changed, changed_head = changes.by_tensor.get(embedding), changes.by_tensor.get(head or "")
    if changed is None and changed_head is None:
        return {}
    if _stay_tied(adapter, changed, changed_head):
        if head is not None:
            changes.by_tensor.pop(head, None)
        assert changed is not None
        # A file that has both gets both alike: which of them a loader takes does not matter then.
        merged = _merged(embedding, changed, sources[embedding].dtype)
        return {head: replace(merged, name=head)} if head is not None and head in sources else {}
    name = head or _head_of(base, embedding, adapter)
    if name is None:
        return {}
    config["tie_word_embeddings"] = False
    if changed_head is not None:
        return {}
    return {name: MergedTensor(name, "Copied", sources[embedding], sources[embedding].dtype)}


def _stay_tied(adapter: Adapter, embedding: Change | None, head: Change | None) -> bool:
    if embedding is None:
        return False
    if head is None:
        # peft trains tokens of both at once, and both whole where it was told to keep them tied.
        only_tokens = embedding.replacement is None and all(isinstance(edit, Rows) for edit in embedding.edits)
        return only_tokens or bool(adapter.config.get("ensure_weight_tying"))
    return _alike(adapter, embedding.tensors, head.tensors)


def _alike(adapter: Adapter, embedding: dict[str, str], head: dict[str, str]) -> bool:
    """Tell whether the adapter's tensors for the embedding and for the head do the same."""
    for part in ("whole", "rows"):
        pair = embedding.get(part), head.get(part)
        if pair != (None, None) and (None in pair or not equal_tensors(adapter, str(pair[0]), str(pair[1]))):
            return False
    a, b = embedding.get("lora_embedding_A"), embedding.get("lora_embedding_B")
    if a is None or b is None or "lora_A" not in head:
        return "lora_A" not in head and a is None
    return bool(
        np.array_equal(adapter.load(head["lora_B"]), adapter.load(a).T)
        and np.array_equal(adapter.load(head["lora_A"]), adapter.load(b).T)
    )


def _head_of(base: Checkpoint, embedding: str, adapter: Adapter) -> str | None:
    """Return the name that an output head of its own has in files, None for a model without one."""
    architectures = base.config.get("architectures") or [""]
    architecture = str(architectures[0])
    if base.config.get("is_encoder_decoder"):
        raise InvalidAdapter(
            f"{adapter.uri}: it changes {embedding}, which encoder, decoder and output head share: train the adapter "
            "with ensure_weight_tying"
        )
    if architecture in _HEADS_OF_ARCHITECTURES:
        return _HEADS_OF_ARCHITECTURES[architecture]
    if adapter.config.get("task_type") == "CAUSAL_LM" or architecture.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    ):
        return "language_model.lm_head.weight" if embedding.startswith("language_model.model.") else "lm_head.weight"
    return None


def _check_vocabulary(
    adapter: Adapter, changes: Changes, tensors: dict[str, MergedTensor], config: dict[str, Any]
) -> None:
    """Note a vocabulary of another size, which embedding and head must agree on."""
    if changes.embedding is None or changes.embedding not in changes.by_tensor:
        return
    rows = changes.by_tensor[changes.embedding].source.shape[0]
    old = changes.by_tensor[changes.embedding].base
    for name in HEADS:
        if name in tensors and tensors[name].source.shape[0] != rows:
            raise InvalidAdapter(
                f"{adapter.uri}: the embedding has {rows} tokens, the output head {name} has "
                f"{tensors[name].source.shape[0]}: train the adapter with both in modules_to_save"
            )
    if old is not None and old.shape[0] != rows:
        config["vocab_size"] = rows


def size_of(tensor: MergedTensor, dtype: str) -> int:
    """Return the bytes that a tensor has in a number format."""
    size = ITEM_BYTES[dtype]
    for length in tensor.source.shape:
        size *= length
    return size
