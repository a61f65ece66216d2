"""The small files of a merged model: configuration, tokenizer, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tunewright_trainer.errors import InvalidModel
from tunewright_trainer.merge.adapter import Adapter
from tunewright_trainer.merge.checkpoint import MAX_JSON_BYTES, Checkpoint, read_object
from tunewright_trainer.merge.plan import MergedTensor, Plan
from tunewright_trainer.merge.readers import Reader
from tunewright_trainer.model_files import CONFIG, SIDE_FILES, WEIGHTS_INDEX

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_STALE_WITH_A_NEW_TOKENIZER = ("special_tokens_map.json", "added_tokens.json")
"""What newer libraries keep in tokenizer_config.json; an old copy of the base's would contradict it."""
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
_ARCHITECTURE = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForPreTraining|ForConditionalGeneration|Model)$")


def side_files(
    base: Checkpoint, adapter: Adapter, plan: Plan, dtype: str | None, outputs: Sequence[str] | None
) -> dict[str, bytes]:
    """Return the small files by name. What training saved with the adapter goes before what the base has.

    Args:
        base: The base model.
        adapter: The adapter.
        plan: The merged model.
        dtype: Number format of all floats, as safetensors writes it; None: the base's.
        outputs: Names of the outputs of a classification head. Default: the base's, where their number fits.

    Raises:
        InvalidModel: A file is damaged.
    """
    names = {name for name in base.reader.files if name.endswith(SIDE_FILES) and "/" not in name}
    names -= {CONFIG, WEIGHTS_INDEX}
    names = {name for name in names if not name.startswith(("pytorch_model", "adapter_"))}
    trained = {name for name in TOKENIZER_FILES if name in adapter.reader.files}
    if "tokenizer_config.json" in trained:
        names -= set(_STALE_WITH_A_NEW_TOKENIZER)
    files = {name: _read(base.reader, name) for name in names - trained}
    files.update({name: _read(adapter.reader, name) for name in trained})
    document = json.dumps(_config(base, adapter, plan, dtype, outputs), indent=2, ensure_ascii=False) + "\n"
    return dict(sorted({**files, CONFIG: document.encode()}.items()))


def _config(
    base: Checkpoint, adapter: Adapter, plan: Plan, dtype: str | None, outputs: Sequence[str] | None
) -> dict[str, Any]:
    config = json.loads(json.dumps(base.config))
    config.pop("quantization_config", None)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else None
    for part in (config, text):
        if part is not None:
            part.update({k: v for k, v in plan.config.items() if part is config or k in part})
            if dtype is not None:
                _set_dtype(part, _DTYPES[dtype])
    if text is not None and "vocab_size" in plan.config and "vocab_size" not in base.config:
        del config["vocab_size"]
    if adapter.config.get("task_type") == "SEQ_CLS":
        _classify(config, adapter, plan, outputs)
    return dict(config)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype


def _classify(config: dict[str, Any], adapter: Adapter, plan: Plan, outputs: Sequence[str] | None) -> None:
    """Make the configuration of a classifier."""
    config["architectures"] = [
        _ARCHITECTURE.sub("ForSequenceClassification", str(name)) for name in config.get("architectures") or ()
    ]
    head = next((tensor for tensor in plan.tensors if tensor.name.endswith(_HEADS)), None)
    labels = _labels(config, head, outputs)
    if labels is not None:
        config["id2label"] = {str(number): name for number, name in enumerate(labels)}
        config["label2id"] = {name: number for number, name in enumerate(labels)}
        config.pop("num_labels", None)
    if config.get("pad_token_id") is None:
        pad = _pad_token(adapter)
        if pad is not None:
            config["pad_token_id"] = pad


def _labels(config: dict[str, Any], head: MergedTensor | None, outputs: Sequence[str] | None) -> list[str] | None:
    if outputs is not None:
        return list(outputs)
    if head is None:
        return None
    count = head.source.shape[0]
    known = config.get("id2label")
    if isinstance(known, dict) and len(known) == count:
        return [str(known[key]) for key in sorted(known, key=int)]
    return [f"LABEL_{number}" for number in range(count)]


def _pad_token(adapter: Adapter) -> int | None:
    """Return the number of the token that training padded with, which a classifier needs to find the last one."""
    if not {"tokenizer.json", "tokenizer_config.json"} <= set(adapter.reader.files):
        return None
    token = read_object(adapter.reader, "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    added = read_object(adapter.reader, "tokenizer.json").get("added_tokens") or ()
    return next((int(entry["id"]) for entry in added if entry.get("content") == token), None)


def _read(reader: Reader, name: str) -> bytes:
    size = reader.files[name]
    if size > MAX_JSON_BYTES:
        raise InvalidModel(f"{reader.uri}/{name}: {size} bytes, which no such file has")
    return reader.read(name, 0, size)
