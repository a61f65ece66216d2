"""Checkpoints of random weights and adapters for them, written without ever being in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunewright_trainer.merge.sinks import Sink

BLOCK_ELEMENTS = 4 * 1024 * 1024
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value: int
    """Width of keys and of values."""
    vocabulary: int
    shards: int
    tied: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of the layers that the adapter targets, by module."""
        sizes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.key_value, self.hidden),
            "self_attn.v_proj": (self.key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{n}.{name}": size for n in range(self.layers) for name, size in sizes.items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return all tensors of the checkpoint."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        found.update({f"{name}.weight": size for name, size in self.linears().items()})
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def parameters(self) -> int:
        """Return their number."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """Return config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value * self.heads // self.hidden,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    "tiny": Shape(2, 64, 160, 4, 32, 512, 2),
    "smollm2": Shape(30, 576, 1536, 9, 192, 49152, 1, tied=True),
    "200m": Shape(8, 1024, 2816, 16, 512, 32000, 2),
    "3b": Shape(28, 3072, 8192, 24, 1024, 64000, 5),
    "7b": Shape(32, 4096, 11008, 32, 4096, 32000, 5),
}
"""SmolLM2's own, and synthetic ones: of 3.2 and 6.7 billion parameters, and small ones for trying the benchmark."""


def write_base(shape: Shape, sink: Sink) -> int:
    """Write a checkpoint of random bfloat16 numbers in its shards, and return its bytes."""
    names = list(shape.tensors().items())
    total = sum(2 * math.prod(size) for _, size in names)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in names:
        if filled >= total / shape.shards * len(groups) and len(groups) < shape.shards:
            groups.append([])
        groups[-1].append((name, size))
        filled += 2 * math.prod(size)
    places: dict[str, str] = {}
    numbers = _random(BLOCK_ELEMENTS)
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        places.update({name: file for name, _ in group})
        _write_file(sink, file, group, numbers)
    _write(sink, "model.safetensors.index.json", json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    _write(sink, "config.json", json.dumps(shape.config()))
    _write(sink, "tokenizer.json", "{}")
    return total


def write_adapter(shape: Shape, folder: Path) -> None:
    """Write a LoRA adapter for all linear layers, as peft saves it."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, (outputs, inputs) in shape.linears().items():
        for part, size in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
            numbers = generator.standard_normal(size, np.float32) * np.float32(0.02)
            tensors[f"base_model.model.{module}.{part}.weight"] = numbers
    header, end = {}, 0
    for name, numbers in tensors.items():
        start, end = end, end + numbers.nbytes
        header[name] = {"dtype": "F32", "shape": list(numbers.shape), "data_offsets": [start, end]}
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for numbers in tensors.values():
            file.write(numbers.tobytes())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _random(elements: int) -> NDArray[np.uint16]:
    """Return normal numbers of the size of trained weights, in bfloat16."""
    numbers = np.random.default_rng(0).standard_normal(elements, np.float32) * np.float32(0.02)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def _write_file(sink: Sink, file: str, group: list[tuple[str, tuple[int, ...]]], numbers: NDArray[np.uint16]) -> None:
    header, end = {}, 0
    for name, size in group:
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    writer = sink.open(file, 8 + len(encoded) + end)
    writer.write(struct.pack("<Q", len(encoded)) + encoded)
    for _, size in group:
        for piece in _pieces(math.prod(size), numbers):
            writer.write(piece)
    writer.finish()


def _pieces(elements: int, numbers: NDArray[np.uint16]) -> Iterator[memoryview]:
    while elements > 0:
        piece = numbers[:elements]
        yield piece.data.cast("B")
        elements -= len(piece)


def _write(sink: Sink, name: str, text: str) -> None:
    data = text.encode()
    writer = sink.open(name, len(data))
    writer.write(data)
    writer.finish()
