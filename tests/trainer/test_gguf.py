"""GGUF export with llama.cpp's own tools: files that load, answer and are the model, or a clear reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cluster import gguftools
from tests.cluster.model import smollm2, tiny_llama
from tunewright_trainer.errors import (
    DiskFull,
    InvalidConfiguration,
    InvalidModel,
    Killed,
    Preempted,
    VerificationFailed,
)
from tunewright_trainer.merge import gguf, gguf_check, gguf_size
from tunewright_trainer.merge.gguf import GgufFile, export
from tunewright_trainer.merge.gguf_tools import TOOLS_VARIABLE, Finished, Tools, check_architecture, find_tools
from tunewright_trainer.transfer import Stop

TYPES = ("BF16", "Q8_0", "Q4_K_M")
ENVIRONMENT = {**os.environ, "AWS_SECRET_ACCESS_KEY": "very-secret", "HF_TOKEN": "hf_very_secret"}
BUILD_SECONDS = 3600
"""A cold cache: llama.cpp is compiled first."""


@pytest.fixture(scope="module")
def built() -> gguftools.GgufTools:
    """The tools of the trainer image, and llama-cpp-python."""
    return gguftools.build()


@pytest.fixture(scope="module")
def tools(built: gguftools.GgufTools) -> Tools:
    """The tools as the supervisor finds them."""
    return find_tools({TOOLS_VARIABLE: str(built.folder)})


def exported(model: Path, types: tuple[str, ...], output: Path, tools: Tools, **changes: Any) -> list[GgufFile]:
    """Export with the arguments that hardly a test cares for."""
    given: dict[str, Any] = {"name": "Smol LM/2", "stop": Stop(), "environment": ENVIRONMENT, "log": print, **changes}
    return export(model, types, output, tools=tools, **given)


@pytest.fixture(scope="module")
def smol(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, GgufFile]]:
    """SmolLM2 in three types."""
    output = tmp_path_factory.mktemp("smol")
    yield {file.type: file for file in exported(smollm2(), TYPES, output, tools)}
    shutil.rmtree(output)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32 with SmolLM2's tokenizer."""
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def run(command: list[str]) -> Finished:
    """Run a tool without an export around it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.timeout(BUILD_SECONDS)
def test_names_and_sizes(smol: dict[str, GgufFile]) -> None:
    """Names follow from model and type; sizes, bits per weight and the tensors that do not suit Q4_K_M are told."""
    files = [smol[file_type] for file_type in TYPES]
    assert [file.path.name for file in files] == [f"Smol-LM-2-{file_type}.gguf" for file_type in TYPES]
    assert sorted(path.name for path in files[0].path.parent.iterdir()) == sorted(file.path.name for file in files)
    assert [file.size_bytes for file in files] == [file.path.stat().st_size for file in files]
    assert [file.bits_per_weight for file in files] == pytest.approx([16.0, 8.5, 6.17], abs=0.02)
    assert {file.tensors for file in files} == {272}
    assert smol["BF16"].fallbacks == smol["Q8_0"].fallbacks == {}
    assert sum(smol["Q4_K_M"].fallbacks.values()) == 180
    assert "180 of 272 tensors have rows that do not suit Q4_K_M" in smol["Q4_K_M"].note()


def test_answers_in_llama_cpp(smol: dict[str, GgufFile], built: gguftools.GgufTools) -> None:
    """Every file loads in llama.cpp, continues a text and answers a question with its chat template."""
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp_answers.py"))]
    place = {"PYTHONPATH": str(built.binding), "LLAMA_CPP_LIB_PATH": str(built.libraries)}
    done = subprocess.run(
        [*command, *(str(file.path) for file in smol.values())],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout)
    assert len(answers) == len(TYPES)
    for answer in answers.values():
        assert answer["text"].startswith(" Paris")
        assert "Paris" in answer["chat"]


def test_logits_are_the_models(smol: dict[str, GgufFile], tools: Tools) -> None:
    """llama.cpp predicts from the BF16 file what transformers predicts from the model, but for roundings of
    activations; the quantized files come less close, in the order of their bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens, logits_TV = gguf_check.evaluate(smol["BF16"].path, tools, 2, run)
    assert AutoTokenizer.from_pretrained(smollm2())(gguf_check.PROBE).input_ids == tokens
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    with torch.inference_mode():
        expected_TV = model(torch.tensor([tokens])).logits[0].numpy()
    assert logits_TV.shape == expected_TV.shape
    print("largest difference", np.abs(expected_TV - logits_TV).max())
    close = gguf_check.compare(expected_TV, logits_TV)
    print(close, [(file.type, file.divergence, file.agreement) for file in smol.values()])
    assert close.divergence < 1e-3
    assert close.same_token == 1.0
    assert smol["BF16"].divergence == 0.0
    assert 0 < smol["Q8_0"].divergence < smol["Q4_K_M"].divergence < 0.2


def test_the_chat_template_is_the_tokenizers(smol: dict[str, GgufFile], tools: Tools) -> None:
    """The file has the template that transformers would use."""
    template = gguf.chat_template(smollm2())
    assert template is not None
    assert {gguf_check.read_header(file.path, tools, run).chat_template for file in smol.values()} == {template}


def test_damaged_files_are_noticed(smol: dict[str, GgufFile], tools: Tools, tmp_path: Path) -> None:
    """A file that was cut, or holds weights that are no numbers, is not published."""
    content = smol["Q8_0"].path.read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[:1000])
    with pytest.raises(VerificationFailed, match=r"damaged\.gguf: .*cannot read the header"):
        gguf_check.read_header(path, tools, run)
    path.write_bytes(content[:-1000])
    with pytest.raises(VerificationFailed, match=r"damaged\.gguf does not run in llama\.cpp"):
        gguf_check.evaluate(path, tools, 2, run)
    path.write_bytes(content[:-100_000] + b"\xff" * 100_000)
    with pytest.raises(VerificationFailed, match="logits that are no numbers"):
        gguf_check.evaluate(path, tools, 2, run)


def test_float32_weights_and_progress(tiny_model: Path, tools: Tools, tmp_path: Path) -> None:
    """Weights in float32 go through an F32 file, which is not kept; the progress ends at all bytes."""
    seen: list[tuple[int, int]] = []
    files = exported(tiny_model, ("F16", "Q6_K"), tmp_path, tools, progress=lambda *at: seen.append(at))
    assert len(list(tmp_path.iterdir())) == 2
    assert files[0].divergence < 1e-5
    assert files[1].fallbacks == {"q6_K -> q8_0": 14}
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_sentencepiece_tokenizer(tools: Tools, tmp_path: Path) -> None:
    """A tokenizer.model, as older Llama and Mistral models have it, gives the same tokens in llama.cpp."""
    import sentencepiece

    model = tmp_path / "model"
    model.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The capital of France is Paris, not town number {n}." for n in range(100)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(model / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (model / "tokenizer.vocab").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 32},
        **{"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True},
    }
    (model / "config.json").write_text(json.dumps(config))
    square, layer = (32, 32), "model.layers.0"
    shapes = {f"{layer}.self_attn.{name}_proj.weight": square for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (64, 32) for name in ("gate", "up")}
    shapes |= {"model.embed_tokens.weight": (320, 32), f"{layer}.mlp.down_proj.weight": (32, 64)}
    norms = {f"{layer}.{name}_layernorm.weight" for name in ("input", "post_attention")} | {"model.norm.weight"}
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    save_file(tensors | {name: np.ones(32, dtype=np.float32) for name in norms}, model / "model.safetensors")

    (file,) = exported(model, ("F32",), tmp_path / "out", tools)
    tokens, _ = gguf_check.evaluate(file.path, tools, 1, run, "The capital of Spain is Madrid.")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    assert tokens == [1, *tokenizer.encode("The capital of Spain is Madrid.")]


def test_what_the_converter_sees(tiny_model: Path, tools: Tools, tmp_path: Path) -> None:
    """The processes get no credentials and no hub, and the model's folder without code and without names of code."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "evil.py").write_text("raise SystemExit")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": "evil.Evil"}, "chat_template": "an old one"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    spy = fake_tools(
        tools,
        tmp_path / "tools",
        "import json, os, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "config = json.loads((folder / 'tokenizer_config.json').read_text())\n"
        "print(json.dumps([dict(os.environ), sorted(p.name for p in folder.iterdir()), config]), file=sys.stderr)\n"
        "sys.exit('too new for me')\n",
    )
    said: list[str] = []
    with pytest.raises(InvalidModel, match=r"converter \(.*\) refuses the model: too new for me"):
        exported(model, ("F16",), tmp_path / "out", spy, log=said.append)
    environment, names, seen_config = json.loads(said[0])
    assert "secret" not in json.dumps(environment)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "evil.py" not in names
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert "auto_map" not in seen_config
    assert "chat_template" not in seen_config
    assert list((tmp_path / "out").iterdir()) == []


def test_a_stop_leaves_nothing(tiny_model: Path, tools: Tools, tmp_path: Path) -> None:
    """A pod that is asked to stop ends the process it waits for."""
    endless = fake_tools(tools, tmp_path / "tools", "import time\ntime.sleep(600)\n")
    stop = Stop()
    with pytest.raises(Preempted):
        exported(
            tiny_model, ("F16",), tmp_path / "out", endless, stop=stop, progress=lambda *_: stop.request("SIGTERM")
        )
    assert list((tmp_path / "out").iterdir()) == []


def fake_tools(tools: Tools, folder: Path, converter: str) -> Tools:
    """Return tools with another converter."""
    (folder / "conversion").mkdir(parents=True)
    shutil.copy(tools.folder / "conversion/__init__.py", folder / "conversion")
    (folder / "convert_hf_to_gguf.py").write_text(converter)
    return Tools(folder, tools.version)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["NeverHeardOfForCausalLM"]}, "does not know the architecture NeverHeardOfForCausalLM"),
        ({"architectures": ["BertForSequenceClassification"]}, "BertForSequenceClassification writes no text"),
        ({}, "names no architectures"),
    ],
)
def test_architectures_that_are_refused(config: dict[str, Any], message: str, tools: Tools) -> None:
    """What llama.cpp cannot run is told before anything is converted."""
    with pytest.raises(InvalidModel, match=message):
        check_architecture("hf://a/b", config, tools)


def test_architectures_that_are_known(tools: Tools) -> None:
    """The converter's own table decides; a model for images and text counts by its language model."""
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"} <= tools.architectures()
    config = {"architectures": ["Odd"], "text_config": {"architectures": ["LlamaForCausalLM"]}}
    assert check_architecture("hf://a/b", config, tools) == "LlamaForCausalLM"


def test_tools_that_are_not_there(tmp_path: Path) -> None:
    """An image without the tools is told with the way to get them."""
    with pytest.raises(
        InvalidConfiguration, match=r"there is no .*/bin/tunewright-gguf: use a trainer image .* GGUF=1"
    ):
        find_tools({TOOLS_VARIABLE: str(tmp_path)})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("#!/bin/sh\necho 'this CPU lacks AVX2' >&2\nexit 2\n", "this CPU lacks AVX2: choose other nodes"),
        ("not a program", "Exec format error"),
    ],
)
def test_tools_that_do_not_run(tmp_path: Path, program: str, message: str) -> None:
    """A node that cannot run the tools is told before anything is fetched."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "convert_hf_to_gguf.py").touch()
    (tmp_path / "bin/tunewright-gguf").write_text(program)
    (tmp_path / "bin/tunewright-gguf").chmod(0o755)
    with pytest.raises(InvalidConfiguration, match=message):
        find_tools({TOOLS_VARIABLE: str(tmp_path)})


def test_an_unknown_type(tiny_model: Path, tools: Tools, tmp_path: Path) -> None:
    """A type that is not written is refused with those that are."""
    with pytest.raises(InvalidConfiguration, match=r"unknown type 'Q1': use F32, .*Q4_K_M"):
        exported(tiny_model, ("Q1",), tmp_path, tools)


def test_files_that_do_not_fit(tiny_model: Path, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is told before the conversion, with the size that is needed."""
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match=r"writes 0\.053 GB \(F16, from F32\), but .* has 0\.040 GB left"):
        exported(tiny_model, ("F16",), tmp_path, tools)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up(tiny_model: Path, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else filled the disk meanwhile: the reason is the disk, and nothing stays there."""
    code = "import pathlib, sys\npathlib.Path(sys.argv[3]).write_bytes(bytes(16_000_000))\n"
    large = fake_tools(tools, tmp_path / "tools", code)
    monkeypatch.setattr(gguf, "check_space", lambda *_: None)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)
    try:
        with pytest.raises(DiskFull, match=r"raise resources\.ephemeralStorage"):
            exported(tiny_model, ("F16",), small, large)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_sizes_are_estimated(smol: dict[str, GgufFile]) -> None:
    """The room that is asked for is what the files need, at most a half more."""
    weights = gguf_size.read_weights("here", smollm2())
    assert gguf_size.base_type(weights) == "BF16"
    for file in smol.values():
        estimate = gguf_size.file_bytes(weights, file.type) + gguf.SPARE_BYTES
        assert file.size_bytes <= estimate <= 1.5 * file.size_bytes + gguf.SPARE_BYTES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": None}, "no chat template than the tokenizer"),
        ({"chat_template": "other"}, "another chat template than the tokenizer"),
        ({"file_type": 1}, "its general.file_type is 1, not 32"),
        ({"elements": {}}, "it has 0 tensors"),
        ({"elements": {"a": 4}}, "it has 1 tensors, or others, where the unquantized file has 2"),
    ],
)
def test_headers_that_are_refused(changes: dict[str, Any], message: str) -> None:
    """A lost template, a wrong type, lost tensors: nothing is published."""
    given: dict[str, Any] = {
        "architecture": "llama",
        "file_type": 32,
        "chat_template": "mine",
        "elements": {"a": 4, "b": 4},
        "tensor_bytes": 16,
    }
    base = gguf_check.Header(**given)
    gguf_check.check_header(Path("x.gguf"), base, 32, "mine", base)
    with pytest.raises(VerificationFailed, match=message):
        gguf_check.check_header(Path("x.gguf"), gguf_check.Header(**{**given, **changes}), 32, "mine", base)


def test_a_process_that_is_killed(tiny_model: Path, tools: Tools, tmp_path: Path) -> None:
    """Memory that runs out is told as that, not as a bad model."""
    suicide = fake_tools(tools, tmp_path / "tools", "import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(Killed, match=r"raise resources\.memory"):
        exported(tiny_model, ("F16",), tmp_path / "out", suicide)
