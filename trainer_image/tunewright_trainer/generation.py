"""Answers of a model, of an adapter on its base, word by word: for a look at a result, not for serving it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from tunewright_trainer.errors import GpuOutOfMemory, InvalidConfiguration, InvalidModel
from tunewright_trainer.hardware import TORCH_DTYPES, find_hardware

if TYPE_CHECKING:
    from peft import PeftModel

Device = Literal["auto", "cpu", "cuda"]
Turn = dict[str, str]
"""`role` and `content`."""


class Speaker:
    """A loaded model that answers."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether turns of a conversation can be told apart; without one the last turn's text is continued."""
        return self._tokenizer.chat_template is not None

    @property
    def description(self) -> str:
        """Device and number format."""
        return f"{self._model.device.type}, {str(self._model.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def answer(self, turns: Sequence[Turn], *, max_tokens: int, temperature: float, say: Callable[[str], None]) -> str:
        """Answer the last turn.

        Args:
            turns: The conversation so far.
            max_tokens: The answer is cut here.
            temperature: 0 takes the most likely token every time; above, tokens are drawn.
            say: Gets the text piece by piece, as it comes.

        Returns:
            The whole answer.

        Raises:
            InvalidModel: The chat template does not take these turns.
            GpuOutOfMemory: The conversation is too long for the GPU.
        """
        ids = self._ids(turns).to(self._model.device)
        streamer = _Pieces(self._tokenizer, say)
        with _memory():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                generation_config=generation_config(
                    self._model, self._tokenizer, max_new_tokens=max_tokens, temperature=temperature
                ),
            )
        return "".join(streamer.pieces)

    def _ids(self, turns: Sequence[Turn]) -> torch.Tensor:
        """Return the prompt's tokens, one row of them."""
        if not self.has_chat_template:
            plain: torch.Tensor = self._tokenizer(turns[-1]["content"], return_tensors="pt").input_ids
            return plain
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                list(turns), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        # A template raises what it wants, and it is the model's own.
        except Exception as error:
            raise InvalidModel(f"the chat template does not take this conversation: {error}") from error
        ids: torch.Tensor = encoded["input_ids"]
        return ids


class _Pieces(TextStreamer):
    """Hands on the text of new tokens as soon as it is whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self._say(text)


def load(model_path: Path, adapter_path: Path | None, device: Device, name: str) -> Speaker:
    """Load a model, or an adapter on its base, in the number format that the device computes fastest.

    Args:
        model_path: Folder of the model, or of the adapter's base.
        adapter_path: Folder of the adapter; its tokenizer and chat template go before the base's.
        device: "auto" is the GPU where there is one.
        name: What messages call the model of `model_path`.

    Raises:
        InvalidConfiguration: There is no GPU.
        InvalidModel: Files are missing or damaged, or of an architecture that is not known or predicts no tokens.
        InvalidAdapter: The adapter is not one of this model.
        GpuOutOfMemory: The model is too large for the GPU.
    """
    transformers.utils.logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidConfiguration(f"PyTorch {torch.__version__} sees no GPU: use --device cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    hardware = find_hardware(1 if on_gpu else 0)
    dtype = "BFloat16" if hardware.computes_bfloat16 else "Float16" if on_gpu else "Float32"
    own_tokenizer = adapter_path is not None and (adapter_path / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            adapter_path if own_tokenizer else model_path, local_files_only=True, trust_remote_code=False
        )
        with _memory():
            model = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=TORCH_DTYPES[dtype],
                device_map={"": hardware.device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InvalidModel(f"{name} cannot be loaded: {error}") from error
    if adapter_path is not None:
        # Imported only here: peft costs more time than all else, and a whole model does without it.
        from tunewright_trainer.adapter import load_adapter

        model = load_adapter(model, adapter_path, "the adapter", name)
    return Speaker(model, tokenizer)


def generation_config(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    max_seconds: float | None = None,
) -> GenerationConfig:
    """Return how answers are made: greedily at temperature 0, and to the model's own end."""
    end = model.generation_config.eos_token_id or tokenizer.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        max_time=max_seconds,
        do_sample=temperature > 0,
        **({"temperature": temperature} if temperature > 0 else {}),
        eos_token_id=end,
        pad_token_id=padding,
    )


@contextmanager
def _memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuOutOfMemory(f"the GPU has no memory left ({str(error).splitlines()[0]}): use --device cpu") from error
