"""What a model's configuration alone shows to be wrong, found before its weights are loaded: that may take minutes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunewright_trainer.adapter import adapter_config, with_loaded_adapter
from tunewright_trainer.errors import InvalidModel
from tunewright_trainer.model import base_model_id
from tunewright_trainer.protocol import WorkerTask
from tunewright_trainer.stored_quantization import check_stored


def check_model(task: WorkerTask, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Check tokenizer and adapter against the model's architecture, and return the model without weights.

    Raises:
        InvalidModel: The architecture is not known, the tokenizer is another model's, or the files are quantized in a
            way that no adapter is trained on.
        InvalidConfiguration: The adapter goes on layers that are not there, or has a higher rank than they; or the
            files are quantized in another way than the run says.
        InvalidAdapter: The adapter of model.continueFrom does not fit.
    """
    model = empty_model(task)
    check_stored(task.run, model.config)
    check_vocabulary(model, tokenizer)
    if task.adapter_path is not None:
        with_loaded_adapter(model, task.adapter_path, task.run.model.revision, is_empty=True)
    else:
        adapter_config(model, task.run, str(task.model_path), "SEQ_CLS" if _reads(task) else "CAUSAL_LM")
    return model


def empty_model(task: WorkerTask) -> PreTrainedModel:
    """Return the model without weights: its layers have names and shapes, and no memory.

    Raises:
        InvalidModel: The configuration cannot be read, or is of an architecture that is not known.
    """
    kind: Any = AutoModelForSequenceClassification if _reads(task) else AutoModelForCausalLM
    head = {"num_labels": len(task.adapter_outputs)} if task.adapter_outputs else {}
    try:
        config = AutoConfig.from_pretrained(task.model_path, **head, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidModel(f"the model {task.run.model.uri} cannot be loaded: {error}") from error
    model.name_or_path = base_model_id(task.run)
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of another model, which would index past the embedding.

    Raises:
        InvalidModel: The tokenizer has more tokens than the model.
    """
    embedding = cast("nn.Embedding", model.get_input_embeddings())
    if len(tokenizer) > embedding.num_embeddings:
        raise InvalidModel(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {embedding.num_embeddings} embeddings: "
            "the files in the model's folder do not belong together"
        )


def _reads(task: WorkerTask) -> bool:
    """Tell whether the model gets a head on its last token instead of writing."""
    return task.run.objective.type in ("Reward", "Classification")
