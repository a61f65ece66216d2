"""`tunewright plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.api.builders import Document, spec
from tests.unit.cli.conftest import Run
from tunewright_api.run_config import StorageSettings, TrainRun, build_train_run
from tunewright_cli.rows import steps_of

EXAMPLES = Path(__file__).parents[3] / "examples"


def run_document(resources: Document | None = None, generations: int = 0, **hyperparameters: Any) -> TrainRun:
    """Return a run with 2 rows in a micro-batch and 3 micro-batches of each process in a step."""
    grpo = {"rewards": [{"type": "JSON"}], "generations": generations}
    changed = spec(
        hyperparameters={"batchSize": 2, "gradientAccumulationSteps": 3, **hyperparameters},
        resources=resources,
        objective={"type": "GRPO", "grpo": grpo} if generations else None,
    )
    return build_train_run(changed, name="a", namespace="b", attempt=1, storage=StorageSettings())


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(1.0, 6, 1), (1.0, 7, 2), (1.0, 13, 3), (3.0, 8, 6), (0.5, 12, 1), (0.5, 13, 2), (1.0, 1, 1), (2.0, None, None)],
)
def test_steps_follow_rows_epochs_and_batches(epochs: float, rows: int | None, steps: int | None) -> None:
    """Rounded up wherever a smaller last batch makes a step of its own."""
    assert steps_of(run_document(epochs=epochs), rows) == steps


@pytest.mark.parametrize(
    ("resources", "rows", "steps"),
    [
        ({"gpus": 0}, 24, 4),
        ({"gpus": 2}, 24, 2),
        ({"nodes": 2, "gpus": 0}, 25, 3),
        ({"nodes": 2, "gpus": 2}, 24, 1),
        ({"nodes": 2, "gpus": 2}, 25, 2),
    ],
)
def test_every_process_takes_rows_of_its_own(resources: Document, rows: int, steps: int) -> None:
    """A step takes the micro-batches of all processes."""
    assert steps_of(run_document(resources, epochs=1.0), rows) == steps


@pytest.mark.parametrize(
    ("resources", "epochs", "rows", "steps"),
    [(None, 1.0, 6, 2), (None, 1.0, 8, 2), (None, 1.0, 2, 0), (None, 1.5, 9, 5), ({"nodes": 2}, 1.0, 17, 2)],
)
def test_steps_of_groups_are_whole(resources: Document | None, epochs: float, rows: int, steps: int) -> None:
    """With 2 answers to each of 3 prompts a step and process, what is left over of an epoch is not trained on."""
    assert steps_of(run_document(resources, generations=2, epochs=epochs), rows) == steps


def test_given_steps_need_no_rows_and_packed_rows_no_guess() -> None:
    """maxSteps is the answer; how many packed sequences there are depends on the tokenizer."""
    assert steps_of(run_document(maxSteps=7), None) == 7
    assert steps_of(run_document(epochs=1.0, packing=True), 100) is None


def test_local_data_is_checked_and_counted(run: Run, job_file: Path) -> None:
    """Format, rows after the split, and the steps they make."""
    result = run("plan", "-f", job_file)
    assert result.exit_code == 0, result.output
    assert "Data:  8 PromptCompletion rows for training, 2 for validation" in result.stdout
    assert "Scale: 1 node with 1 process, global batch 6" in result.stdout
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
    assert as_yaml["service"] is None


def test_several_nodes_are_spelt_out(run: Run) -> None:
    """How many processes there are, what they take per step together, and the Service by which they find each other."""
    example = EXAMPLES / "sft-lora-multi-node.yaml"
    text = run("plan", "-f", example).stdout
    assert "Scale: 2 nodes with 1 process each, DDP, global batch 8" in text
    assert "Service and Job that the operator creates for the first attempt" in text
    document = json.loads(run("plan", "-f", example, "--output", "json").stdout)
    assert document["scale"] == {"nodes": 2, "processesPerNode": 1, "parallelism": "DDP", "globalBatchSize": 8}
    service, pod = document["service"], document["job"]["spec"]["template"]
    assert service["metadata"]["name"] == pod["spec"]["subdomain"] == "ftj-docstrings-lora-multi-node-train-1"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


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


MERGE = """\
apiVersion: tunewright.dev/v1alpha1
kind: AdapterMerge
metadata: {name: merge}
spec:
  adapters: [{fineTuneJob: bot}, {uri: s3://models/tone, weight: 0.5}]
  combination: {type: TIES}
  maxShardSize: 1GB
  output: {uri: s3://models/merged}
"""


def test_a_merge_is_planned_too(run: Run, tmp_path: Path) -> None:
    """Its settings with their origin, and the Job that the operator creates; text, JSON and YAML agree."""
    file = tmp_path / "merge.yaml"
    file.write_text(MERGE)
    text = run("plan", "-f", file).stdout
    assert "merge: merge of FineTuneJob bot, s3://models/tone into the model that the first one was trained on" in text
    assert "Job that the operator creates for the first attempt" in text
    document = json.loads(run("plan", "-f", file, "--output", "json").stdout)
    assert document == yaml.safe_load(run("plan", "-f", file, "--output", "yaml").stdout)
    settings = {s["field"]: (s["value"], s["from"]) for s in document["settings"]}
    assert settings["combination.density"] == (0.5, "default")
    assert settings["combination.type"] == ("TIES", "given")
    assert settings["maxShardSize"] == ("1GB", "given")
    assert settings["dtype"] == ("Auto", "default")
    assert document["job"]["metadata"]["name"] == "merge-merge-1"


def test_a_merge_of_local_files_has_no_job(run: Run, tmp_path: Path) -> None:
    """Local paths are for local runs."""
    file = tmp_path / "merge.yaml"
    file.write_text(MERGE.replace("s3://models/merged", str(tmp_path / "out")))
    assert "No Job: local paths are only for `tunewright run`." in run("plan", "-f", file).stdout


def test_the_model_of_a_merge_is_named(run: Run, tmp_path: Path) -> None:
    """Where it will lie is not known before; the Job shows a place holder."""
    file = tmp_path / "job.yaml"
    example = yaml.safe_load((EXAMPLES / "sft-lora.yaml").read_text().split("\n---\n")[-1])
    example["spec"]["model"] = {"fromMerge": "merged"}
    file.write_text(yaml.safe_dump(example))
    text = run("plan", "-f", file).stdout
    assert "LoRA of the model of AdapterMerge merged" in text
    document = json.loads(run("plan", "-f", file, "--output", "json").stdout)
    settings = {s["field"]: (s["value"], s["from"]) for s in document["settings"]}
    assert settings["model.fromMerge"] == ("merged", "given")
    assert "model.uri" not in settings
    assert "s3://set-once-the-merge-is-complete/merged" in json.dumps(document["job"])
