"""What transformers makes of a model's files without their weights: classes, names of parameters, tokenizers.

Shapes: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunewright_trainer.errors import InvalidModel, VerificationFailed
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.lazy_model import TORCH_DTYPES
from tunewright_trainer.merge.probes import CHAT_PROMPTS, PLAIN_PROMPTS
from tunewright_trainer.merge.readers import Reader

MAX_TOKENS = 48
"""Of a prompt; the end of a longer one is taken, where a user's words are in a conversation."""
_SMALL_FILES = (".json", ".jinja", ".txt", ".model")
_SMALL_BYTES = 1 << 27
"""Tokenizers of 250,000 tokens have files of 35 MB."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""By the task type of an adapter."""


@dataclass(frozen=True)
class Files:
    """The files of a model: weights where they are, the small ones in a folder."""

    uri: str
    folder: Path
    checkpoint: Checkpoint

    def config(self) -> PreTrainedConfig:
        """Load the configuration.

        Raises:
            InvalidModel: There is none, or transformers does not know models of this type.
        """
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InvalidModel(f"the configuration of {self.uri} cannot be loaded: {error}") from error
        return config


def fetch_small(reader: Reader, folder: Path) -> None:
    """Copy what is no weights into a folder: configuration and tokenizer."""
    folder.mkdir()
    for name, size in reader.files.items():
        if "/" not in name and name.endswith(_SMALL_FILES) and size <= _SMALL_BYTES:
            (folder / name).write_bytes(reader.read(name, 0, size))


def model_class(task_type: str | None, config: PreTrainedConfig) -> Any:
    """Return what builds a model for an adapter: by the adapter's task, else the class that the files name.

    Raises:
        InvalidModel: Neither says which.
    """
    if task_type in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task_type])
    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise InvalidModel(
            f"adapters with task_type {task_type!r} are checked with the class that config.json names in "
            f"architectures, which transformers does not have: {name!r}"
        )
    return found


def check_files(model: PreTrainedModel, merged: Files, base: Files) -> None:
    """Compare the names and shapes in merged files with those that transformers loads into this model.

    Raises:
        VerificationFailed: Something is missing, left over, or of another shape.
    """
    named = model.config.architectures or []
    if named[:1] != [type(model).__name__]:
        raise VerificationFailed(
            f"config.json of the merged model names the class {listed_names(named)}, but the adapter is one of "
            f"{type(model).__name__}"
        )
    report = _loading_report(model, merged.checkpoint)
    # What the base has too much, such as buffers that older versions saved, is copied like everything else.
    left_over = set(report["unexpected_keys"]) - set(_loading_report(model, base.checkpoint)["unexpected_keys"])
    for names, fault in (
        (report["missing_keys"], "lack parameters, which would be drawn at random"),
        (left_over, "have tensors that the model has no use for"),
        ([found[0] for found in report["mismatched_keys"]], "have tensors of other shapes than config.json says"),
    ):
        if names:
            raise VerificationFailed(f"the merged files {fault}: {listed_names(sorted(names))}; nothing is published")


def _loading_report(model: PreTrainedModel, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Let transformers load tensors without content, and say what fitted."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
        for name, tensor in checkpoint.tensors.items()
    }
    loaded: Any = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=tensors,
        device_map={"": "meta"},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return dict(loaded[1])


def listed_names(names: Sequence[str]) -> str:
    """Return a few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path, uri: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        InvalidModel: Its files are damaged or of a kind that is not known.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidModel(f"the tokenizer of {uri} cannot be loaded: {error}") from error
    return tokenizer


def check_tokenizer(merged: Files, expected: Path, uri: str) -> PreTrainedTokenizerBase:
    """Load the merged model's tokenizer, and compare it with the one that it must be.

    Args:
        merged: The merged model.
        expected: Folder of the adapter, or of the base where the adapter has none.
        uri: Name of that in messages.

    Raises:
        VerificationFailed: It is missing, or another one.
    """
    wanted = load_tokenizer(expected, uri)
    if not has_tokenizer(merged.folder):
        raise VerificationFailed(f"the tokenizer of {uri} is lost: the merged model has none; nothing is published")
    try:
        found = load_tokenizer(merged.folder, merged.uri)
    except InvalidModel as error:
        raise VerificationFailed(f"{error}; nothing is published") from error
    if found.chat_template != wanted.chat_template:
        what = "lost: the merged model has none" if found.chat_template is None else "another one in the merged model"
        raise VerificationFailed(f"the chat template (chat_template) of {uri} is {what}; nothing is published")
    if found.get_vocab() != wanted.get_vocab():
        raise VerificationFailed(
            f"the tokenizer of the merged model has another vocabulary ({len(found)} tokens) than the one of {uri} "
            f"({len(wanted)} tokens); nothing is published"
        )
    return found


def probe_ids(tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[str], vocabulary: int) -> torch.Tensor:
    """Return the prompts as token ids of equal length, so that no padding is needed: shorter ones are repeated.

    Args:
        tokenizer: None: ids are made up, evenly over the vocabulary, the same each time.
        prompts: The user's own.
        vocabulary: Number of tokens that the model knows.

    Returns:
        ids_BT, T at most MAX_TOKENS.

    Raises:
        VerificationFailed: The chat template fails, or the tokenizer gives ids that the model does not know.
    """
    if tokenizer is None:
        rows = len(PLAIN_PROMPTS) + len(CHAT_PROMPTS)
        return torch.linspace(0, vocabulary - 1, rows * MAX_TOKENS).long().view(MAX_TOKENS, rows).T.contiguous()
    encoded = [tokenizer(text)["input_ids"] for text in PLAIN_PROMPTS]
    encoded += [_as_chat(tokenizer, text) for text in (*CHAT_PROMPTS, *prompts)]
    ends = [ids[-MAX_TOKENS:] for ids in encoded if ids]
    length = max(map(len, ends))
    ids_BT = torch.tensor([(ids * length)[:length] for ids in ends])
    if (highest := int(ids_BT.max())) >= vocabulary:
        raise VerificationFailed(
            f"the tokenizer gives the token {highest}, but the merged model has embeddings for {vocabulary} tokens "
            "only: it lacks tokens that were added in training; nothing is published"
        )
    return ids_BT


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": text}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise VerificationFailed(f"the chat template fails for a user's turn: {error}; nothing is published") from error
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
