"""`tunewright chat` with real models: base, adapter, and merged model, from folders and from S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.trainer.kit import WRITER, Bucket
from tests.trainer.s3_fixtures import bucket, make_storage, server, shared_bucket  # noqa: F401
from tunewright_cli.main import app
from tunewright_trainer.hardware import TORCH_DTYPES, find_hardware
from tunewright_trainer.publish import Result, output_files, publish

pytestmark = pytest.mark.timeout(300)

QUESTION = "What is 2 plus 2?"
TOKENS = 8
OPTIONS = ("--max-tokens", str(TOKENS), "--device", "cpu")


def dtype() -> torch.dtype:
    """Return the number format that this CPU computes fastest."""
    return TORCH_DTYPES["BFloat16" if find_hardware(0).computes_bfloat16 else "Float32"]


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """An adapter with a large effect, which names the tiny model as its base."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def merged(tiny: Path, adapter: Path, tmp_path: Path) -> Path:
    """The adapter merged into its base."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


@torch.inference_mode()
def answer(model: Any, tiny: Path, turns: list[dict[str, str]] | str) -> str:
    """Return the answer that transformers gives, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if isinstance(turns, str):
        given = tokenizer(turns, return_tensors="pt")
    else:
        given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = given["input_ids"].shape[1]
    ids = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))


def chat(*arguments: str | Path, stdin: str | None = None) -> str:
    """Run the command and return what it says on stdout."""
    result = CliRunner().invoke(app, ["chat", *map(str, arguments), *OPTIONS], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_base_adapter_and_merged_model_answer(tiny: Path, adapter: Path, merged: Path) -> None:
    """Each gives what transformers and peft give; the adapter's answer is its own, and the merged model's too."""
    turns = [{"role": "user", "content": QUESTION}]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype())
    base = answer(model, tiny, turns)
    tuned = answer(PeftModel.from_pretrained(model, adapter), tiny, turns)
    assert base != tuned
    assert chat(tiny, "--prompt", QUESTION) == base + "\n"
    assert chat(adapter, "--prompt", QUESTION) == tuned + "\n"
    whole = answer(AutoModelForCausalLM.from_pretrained(merged, dtype=dtype()), tiny, turns)
    assert chat(merged, "--prompt", QUESTION) == whole + "\n"


def test_a_conversation_and_plain_text(tiny: Path, tmp_path: Path) -> None:
    """The second line is answered with the first one before it; without a template a line is continued as it is."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype())
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    first = answer(model, tiny, turns)
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert (
        chat(tiny, "--system", "Be brief.", stdin=f"{QUESTION}\nWhy?\n") == f"{first}\n{answer(model, tiny, turns)}\n"
    )

    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    assert chat(plain, "--prompt", "Once upon a time") == answer(model, tiny, "Once upon a time") + "\n"


def test_tokens_are_drawn_above_temperature_0(tiny: Path) -> None:
    """Two draws differ sooner or later."""
    drawn = {chat(tiny, "--prompt", QUESTION, "--temperature", "5") for _ in range(3)}
    assert len(drawn) > 1


def test_results_in_s3(tiny: Path, adapter: Path, bucket: Bucket) -> None:  # noqa: F811
    """A published adapter is fetched and verified, a plain folder of files is fetched, and so is a base model."""
    for path in tiny.iterdir():
        bucket.client.upload_file(str(path), bucket.name, f"base/{path.name}")
    for path in adapter.iterdir():
        bucket.client.upload_file(str(path), bucket.name, f"plain/{path.name}")
    result = Result("0123456789abcdef", WRITER, "Adapter", "adapter", output_files(adapter.parent), {})
    publish(make_storage(bucket.server.endpoint), f"s3://{bucket.name}/out", result)
    s3 = ("--prompt", QUESTION, "--endpoint", bucket.server.endpoint)
    wanted = chat(adapter, "--prompt", QUESTION)
    assert chat(f"s3://{bucket.name}/out", *s3) == wanted
    assert chat(f"s3://{bucket.name}/plain/", "--base", f"s3://{bucket.name}/base", *s3) == wanted


def test_an_adapter_of_another_model(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    """Said in one line, with both names; so is a device that is not there."""
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.hidden_size, config.num_attention_heads = 32, 2
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(other)
    result = CliRunner().invoke(app, ["chat", str(adapter), "--base", str(other), "--prompt", "a", *OPTIONS])
    assert result.exit_code == 20
    assert f"error: the adapter does not fit {other}: " in result.stderr
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, ["chat", str(tiny), "--prompt", "a", "--device", "cuda"])
        assert (result.exit_code, "sees no GPU: use --device cpu" in result.stderr) == (20, True)
