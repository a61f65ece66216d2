"""`tunewright convert`: whole configurations against what they become, the command, the tables and their page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from tests.unit.cli.conftest import Run
from tunewright_api.v1alpha1.finetunejob import FineTuneJobSpec
from tunewright_api.validation import parse_finetunejob
from tunewright_cli.axolotl.convert import FIELDS, convert, job_name
from tunewright_cli.axolotl.data import MESSAGE_ROLES, SHAREGPT_ROLES, SOURCE_FIELDS
from tunewright_cli.axolotl.keys import CONFIG, SOURCE, Unmapped, find
from tunewright_cli.axolotl.reinforcement import TRL, TRL_KEYS
from tunewright_cli.axolotl.templates import CHATML, LLAMA3
from tunewright_cli.kubectl_yaml import read_documents, write_document
from tunewright_trainer.data_formats import SHAREGPT_ROLES as ROLES_OF_THE_TRAINER
from tunewright_trainer.fields import ROLES

FOLDER = Path(__file__).parent / "axolotl"
CONFIGURATIONS = sorted(path.stem for path in FOLDER.glob("*.yml"))
PAGE = Path(__file__).parents[3] / "docs" / "axolotl.md"
ALPACA = {"path": "s3://datasets/rows.jsonl", "type": "alpaca"}
CHAT = {"path": "s3://datasets/rows.jsonl", "type": "chat_template"}
LORA = {"adapter": "lora", "lora_r": 8, "lora_target_linear": True}
BASE: dict[str, Any] = {"base_model": "org/model", "datasets": [ALPACA], **LORA}
GRPO_OBJECTIVE: dict[str, Any] = {"rl": "grpo", "trl": {"reward_funcs": ["a.b"], "num_generations": 2}}
GRPO: dict[str, Any] = {**BASE, **GRPO_OBJECTIVE, "micro_batch_size": 2}
VALUES: tuple[Any, ...] = (
    {"a": 1},
    ["a"],
    [1],
    [{"a": []}],
    "a",
    "",
    -1,
    0.5,
    10**30,
    True,
    False,
    [],
    {},
    float("nan"),
    None,
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_real_configuration_becomes_a_finetunejob(run: Run, name: str, tmp_path: Path) -> None:
    """The file beside it, to the letter; what is said about it stands in the .txt file, and nowhere else."""
    text = (FOLDER / f"{name}.yml").read_text()
    (tmp_path / f"{name}.yml").write_text(text)
    result = run("convert", tmp_path / f"{name}.yml")
    assert result.exit_code == 0
    assert result.stdout == (FOLDER / f"{name}.yaml").read_text()
    assert result.stderr.replace(f"{tmp_path}/", "") == (FOLDER / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_result_is_read_alike_by_kubectl_and_pyyaml(name: str) -> None:
    """It is valid, and its numbers are numbers for both readers."""
    text = (FOLDER / f"{name}.yaml").read_text()
    (document,) = read_documents(text, name)
    parse_finetunejob(document.content)
    assert yaml.safe_load(text) == document.content


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_key_is_dropped_silently(name: str) -> None:
    """Every key that is set either has a field or is named on stderr."""
    (document,) = read_documents((FOLDER / f"{name}.yml").read_text(), name)
    notes = convert(document.content, name).notes
    named = {re.split(r"[.\[]", note.path)[0] for note in notes}
    given_keys = {key for key, value in document.content.items() if value is not None}
    assert given_keys <= named | set(FIELDS)


def test_every_objective_and_method_of_axolotl_is_among_the_configurations() -> None:
    """Supervised, DPO, KTO, reward and GRPO; full, LoRA, 4 and 8 bits."""
    specs = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["spec"] for name in CONFIGURATIONS]
    assert {spec.get("objective", {}).get("type", "SFT") for spec in specs} == {"SFT", "DPO", "KTO", "Reward", "GRPO"}
    methods = {(spec["method"]["type"], spec["method"].get("quantization", {}).get("bits")) for spec in specs}
    assert methods == {("Full", None), ("LoRA", None), ("QLoRA", 4), ("QLoRA", 8)}


def test_all_errors_come_at_once_with_their_place(run: Run, tmp_path: Path) -> None:
    """Exit code 20, one line each, and nothing is written."""
    file = tmp_path / "config.yml"
    file.write_text("base_model: gpt2\nadapter: unknown\ndatasets:\n  - path: a.jsonl\n    type: oasst\n")
    result = run("convert", file, "-o", tmp_path / "job.yaml")
    assert result.exit_code == 20
    first, *lines = result.stderr.splitlines()
    assert first == "error: cannot be converted"
    assert [line.split(": ")[:3] for line in lines] == [
        [f"{file}:1:1", "error", "base_model"],
        [f"{file}:5:5", "error", "datasets[0].type"],
        [f"{file}:2:1", "error", "adapter"],
    ]
    assert not (tmp_path / "job.yaml").exists()


def test_the_result_goes_to_a_file_under_a_name(run: Run, tmp_path: Path) -> None:
    """`-o` and `--name`; stdin is read as `-`."""
    text = (FOLDER / "llama-kto.yml").read_text()
    result = run("convert", "-", "--name", "kto", "-o", tmp_path / "job.yaml", stdin=text)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert run("validate", "-f", tmp_path / "job.yaml").stdout == f"{tmp_path}/job.yaml: FineTuneJob kto is valid\n"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("- a\n", (), "not an Axolotl configuration"),
        ("", (), "not an Axolotl configuration"),
        ("a: [", (), "not valid YAML"),
        ("base_model: org/model\n", ("--name", "My_Job"), "such as my-job"),
        ("base_model: org/model\n", ("--name", "x" * 46), "such as xxx"),
    ],
)
def test_what_is_no_configuration_is_refused(run: Run, text: str, arguments: tuple[str, ...], message: str) -> None:
    """Exit code 20 and the reason."""
    result = run("convert", "-", *arguments, stdin=text)
    assert result.exit_code == 20
    assert message in result.stderr


@pytest.mark.parametrize(
    ("text", "name"),
    [("qlora", "qlora"), ("My Config_7B", "my-config-7b"), ("--", "axolotl"), ("x" * 60, "x" * 45)],
)
def test_a_file_s_name_becomes_a_job_s_name(text: str, name: str) -> None:
    """Lower-case letters, digits and dashes, at most 45."""
    assert job_name(text) == name


@pytest.mark.parametrize("key", [*FIELDS, "special_tokens", "plugins", "excess_length_strategy"])
def test_no_value_of_a_key_breaks_the_conversion(key: str) -> None:
    """Whatever stands there, the answer is a FineTuneJob or an error that names a key."""
    evaluated = {"val_set_size": 0.1, "eval_steps": 10, "save_steps": 20, "early_stopping_patience": 2}
    for value in VALUES:
        for config in (BASE, {**BASE, **evaluated}, GRPO):
            conversion = convert({**config, key: value}, "name")
            assert (conversion.document is None) == bool(conversion.errors)


@pytest.mark.parametrize("key", [*TRL_KEYS, *TRL.refused, *TRL.not_needed])
def test_no_value_of_a_key_of_trl_breaks_the_conversion(key: str) -> None:
    """The same for the block of GRPO."""
    for value in VALUES:
        conversion = convert({**GRPO, "trl": {**GRPO["trl"], key: value}}, "name")
        assert (conversion.document is None) == bool(conversion.errors)


@pytest.mark.parametrize("key", [*SOURCE_FIELDS, *SOURCE.refused])
@pytest.mark.parametrize("objective", [{}, {"rl": "dpo"}, {"rl": "kto"}, {"reward_model": True}, GRPO_OBJECTIVE])
def test_no_value_of_a_data_set_s_key_breaks_the_conversion(key: str, objective: dict[str, Any]) -> None:
    """The same, one level below, for every objective."""
    for source in (ALPACA, CHAT, {**CHAT, "type": "chatml.ultra"}, {**CHAT, "type": "chat_template.default"}):
        for value in VALUES:
            conversion = convert({**BASE, **objective, "datasets": [{**source, key: value}]}, "name")
            assert (conversion.document is None) == bool(conversion.errors)


def test_every_field_of_the_table_is_in_the_api() -> None:
    """The table of keys names fields that there are."""
    for fields in (*FIELDS.values(), *SOURCE_FIELDS.values()):
        for field in fields.split(", "):
            model: Any = FineTuneJobSpec
            for part in field.replace("[]", "").split("."):
                known = {to_camel(name): info.annotation for name, info in model.model_fields.items()}
                assert part in known, field
                model = _model_in(known[part])


def _model_in(annotation: Any) -> Any:
    """Return the model inside an annotation, or a model without fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [found for part in getattr(annotation, "__args__", ()) if (found := _model_in(part)) is not BaseModel]
    return inner[0] if inner else BaseModel


def test_no_key_stands_in_two_tables() -> None:
    """A converted key is never reported as unknown or as not needed."""
    for mapped, unmapped in ((FIELDS, CONFIG), (SOURCE_FIELDS, SOURCE)):
        tables = (unmapped.not_needed, unmapped.not_converted, unmapped.refused)
        for table in tables:
            for key in table:
                assert key not in mapped
                assert sum(key in other for other in tables) == 1
    for key in FIELDS:
        conversion = convert({**BASE, key: "x"}, "name")
        assert not any("not a key known here" in note.text for note in conversion.notes), key


def test_roles_are_those_that_the_trainer_reads() -> None:
    """A role that the trainer knows must not be an error here, nor the other way round."""
    assert SHAREGPT_ROLES == ROLES_OF_THE_TRAINER
    assert set(MESSAGE_ROLES) == ROLES


def test_chat_templates_write_what_their_names_stand_for() -> None:
    """The formats of ChatML and of Llama 3, with and without the opening of the next answer."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    chatml, llama3 = (ImmutableSandboxedEnvironment().from_string(text) for text in (CHATML, LLAMA3))
    assert chatml.render(messages=turns) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb <|im_end|>\n"
    assert chatml.render(messages=[], add_generation_prompt=True) == "<|im_start|>assistant\n"
    start = "<|start_header_id|>{}<|end_header_id|>\n\n"
    whole = "<s>" + start.format("user") + "a<|eot_id|>" + start.format("assistant") + "b<|eot_id|>"
    assert llama3.render(messages=turns, bos_token="<s>") == whole
    asked = llama3.render(messages=turns[:1], bos_token="<s>", add_generation_prompt=True)
    assert whole.startswith(asked)
    assert asked.endswith(start.format("assistant"))


def test_a_family_is_found_by_its_beginning_and_end() -> None:
    """`wandb_*` stands for all keys of W&B, `is_*_derived_model` for those of model families."""
    assert find("wandb_run_id", CONFIG.not_converted) is not None
    assert find("is_llama_derived_model", CONFIG.not_needed) is not None
    assert find("is_llama_model", CONFIG.not_needed) is None


def test_text_that_kubectl_would_misread_is_quoted() -> None:
    """Numbers, booleans and dates as text stay text for both readers; long text is a block."""
    texts = ["2e-4", "y", "on", "null", "010", "2020-01-01", "plain", ""]
    content = {"texts": texts, "long": "x y " * 50 + "\nz", "number": 1e-5}
    text = write_document(content)
    (document,) = read_documents(text, "text")
    assert document.content == content == yaml.safe_load(text)


def test_the_example_on_the_page_is_what_the_command_prints() -> None:
    """The configuration and the FineTuneJob below it."""
    config, job = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (document,) = read_documents(config, "page")
    assert write_document(convert(document.content, "axolotl").document) == job


@pytest.mark.parametrize("unmapped", [CONFIG, SOURCE], ids=["config", "source"])
def test_the_page_names_every_key(unmapped: Unmapped) -> None:
    """docs/axolotl.md has a row for each key that is converted, and the reason for each one that is not."""
    page = PAGE.read_text()
    mapped = FIELDS if unmapped is CONFIG else SOURCE_FIELDS
    for key, fields in mapped.items():
        shown = ", ".join(f"`{field}`" for field in fields.split(", "))
        assert re.search(rf"^\| `{re.escape(key)}` \| {re.escape(shown)} \|", page, re.MULTILINE), key
    for table in (unmapped.not_needed, unmapped.not_converted, unmapped.refused):
        for key in table:
            assert f"`{key}`" in page, key


def test_the_page_names_every_key_of_trl() -> None:
    """Those of GRPO's block have a section of their own."""
    (section,) = re.findall(r"^### In `trl`, for GRPO$(.*?)^Classification", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for key in (*TRL_KEYS, *TRL.not_needed, *TRL.not_converted, *TRL.refused):
        assert f"`{key}`" in section, key
