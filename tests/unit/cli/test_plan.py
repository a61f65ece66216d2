"""`tunewright plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.unit.cli.conftest import Run
from tunewright_api.defaults import ResolvedHyperparameters
from tunewright_cli.rows import steps_of

EXAMPLES = Path(__file__).parents[3] / "examples"


def hyperparameters(
    epochs: float | None = None, max_steps: int | None = None, packing: bool = False
) -> ResolvedHyperparameters:
    """Return arguments with 2 rows in a micro-batch and 3 micro-batches in a step."""
    return ResolvedHyperparameters(
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=1e-4,
        scheduler="Cosine",
        warmup_ratio=0.0,
        batch_size=2,
        gradient_accumulation_steps=3,
        max_sequence_length=64,
        packing=packing,
        optimizer="AdamW",
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        seed=1,
    )


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(1.0, 6, 1), (1.0, 7, 2), (1.0, 13, 3), (3.0, 8, 6), (0.5, 12, 1), (0.5, 13, 2), (1.0, 1, 1), (2.0, None, None)],
)
def test_steps_follow_rows_epochs_and_batches(epochs: float, rows: int | None, steps: int | None) -> None:
    """Rounded up wherever a smaller last batch makes a step of its own."""
    assert steps_of(hyperparameters(epochs=epochs), rows) == steps


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1.0, 6, 2), (1.0, 8, 2), (1.0, 2, 0), (1.5, 9, 5)])
def test_steps_of_groups_are_whole(epochs: float, rows: int, steps: int) -> None:
    """With 2 answers to each of 3 prompts a step, what is left over of an epoch is not trained on."""
    assert steps_of(hyperparameters(epochs=epochs), rows, 2) == steps


def test_given_steps_need_no_rows_and_packed_rows_no_guess() -> None:
    """maxSteps is the answer; how many packed sequences there are depends on the tokenizer."""
    assert steps_of(hyperparameters(max_steps=7), None) == 7
    assert steps_of(hyperparameters(epochs=1.0, packing=True), 100) is None


def test_local_data_is_checked_and_counted(run: Run, job_file: Path) -> None:
    """Format, rows after the split, and the steps they make."""
    result = run("plan", "-f", job_file)
    assert result.exit_code == 0, result.output
    assert "Data:  8 PromptCompletion rows for training, 2 for validation" in result.stdout
    assert "Steps: 6, 6 rows each" in result.stdout
    assert "No Job: local paths are only for `tunewright run`." in result.stdout


def test_every_setting_says_whether_it_was_given(run: Run, job_file: Path) -> None:
    """Nobody has to guess a default."""
    result = run("plan", "-f", job_file, "--output", "json")
    settings = {s["field"]: (s["value"], s["from"]) for s in json.loads(result.stdout)["settings"]}
    assert settings["hyperparameters.epochs"] == (3.0, "given")
    assert settings["hyperparameters.learningRate"] == (2e-4, "default")
    assert settings["method.lora.rank"] == (16, "default")
    assert settings["evaluation.strategy"] == ("Epoch", "default")


def test_bad_rows_are_named_before_anything_is_applied(run: Run, job_file: Path, rows: Path) -> None:
    """The same check as in the cluster, with the same exit code."""
    with rows.open("a") as file:
        file.write('{"prompt": 1, "completion": "x"}\n')
    result = run("plan", "-f", job_file)
    assert result.exit_code == 20
    assert f"{rows}: line 11: prompt: must be a string, is a number" in result.stderr


def test_data_out_of_reach_does_not_stop_the_plan(run: Run) -> None:
    """Without credentials the rest is still worth seeing."""
    result = run("plan", "-f", EXAMPLES / "sft-lora.yaml", "--output", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["totalSteps"] == 30
    assert "AWS_" in document["data"]["problem"]


def test_the_job_is_the_one_that_the_operator_creates(run: Run) -> None:
    """Name, image from the platform's settings and the user's resources are there; YAML and JSON agree."""
    as_yaml = yaml.safe_load(run("plan", "-f", EXAMPLES / "sft-lora.yaml", "--output", "yaml").stdout)
    assert as_yaml == json.loads(run("plan", "-f", EXAMPLES / "sft-lora.yaml", "--output", "json").stdout)
    job = as_yaml["job"]
    assert (job["kind"], job["metadata"]["name"]) == ("Job", "docstrings-lora-train-1")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "3Gi"


def test_one_of_several_jobs_is_chosen_by_name(run: Run, tmp_path: Path) -> None:
    """Without a choice, and with a wrong one, the names are listed."""
    both = tmp_path / "both.yaml"
    both.write_text("---\n".join((EXAMPLES / f"sft-{kind}.yaml").read_text() for kind in ("lora", "full")))
    undecided = run("plan", "-f", both)
    assert undecided.exit_code == 20
    assert "choose one with --name (docstrings-lora, docstrings-full)" in undecided.stderr
    assert "there are docstrings-lora" in run("plan", "-f", both, "--name", "other").stderr
    chosen = run("plan", "-f", both, "--name", "docstrings-full", "--output", "json")
    assert json.loads(chosen.stdout)["name"] == "docstrings-full"


def test_an_invalid_job_is_explained_as_validate_does(run: Run, job_file: Path) -> None:
    """File, line and column."""
    job_file.write_text(job_file.read_text().replace("epochs", "epoch"))
    result = run("plan", "-f", job_file)
    assert result.exit_code == 20
    assert f"{job_file}:8:21: spec.hyperparameters.epoch: unknown field 'epoch'" in result.stderr
