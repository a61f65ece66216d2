"""`tunewright validate`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.cli.conftest import Run

BROKEN = """\
apiVersion: tunewright.dev/v1alpha1
kind: FineTuneJob
metadata: {name: broken}
spec:
  model: {uri: hf://organisation/name}
  dataset: {train: [{uri: s3://bucket/train.jsonl}]}
  method: {type: LoRA}
  hyperparameters:
    learningrate: 2e-4
    seed: "1"
  output: {uri: s3://bucket/output}
"""
VALID = BROKEN.replace("learningrate", "learningRate").replace('"1"', "1")
SECRET = "apiVersion: v1\nkind: Secret\nmetadata: {name: s3}\n"


def test_every_problem_comes_with_file_line_and_column(run: Run, tmp_path: Path) -> None:
    """In the form that editors turn into links; exit code 20, as the trainer's for invalid input."""
    file = tmp_path / "job.yaml"
    file.write_text(BROKEN)
    result = run("validate", "-f", file)
    assert result.exit_code == 20
    assert result.stdout.splitlines() == [
        f"{file}:9:5: spec.hyperparameters.learningrate: unknown field 'learningrate': did you mean 'learningRate'?",
        f"{file}:10:5: spec.hyperparameters.seed: Input should be a valid integer (a string, '1', stands there: "
        "remove the quotes)",
    ]


def test_a_valid_file_passes(run: Run, tmp_path: Path) -> None:
    """A float that PyYAML would take for text is fine; other objects in the file are not judged."""
    file = tmp_path / "job.yaml"
    file.write_text(f"{VALID}---\n{SECRET}")
    result = run("validate", "-f", file)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{file}: FineTuneJob broken is valid",
        f"{file}: Secret s3 is not looked at",
    ]


def test_stdin_and_folders_are_read_like_kubectl_does(run: Run, tmp_path: Path) -> None:
    """`-` is stdin, a folder stands for the YAML and JSON files in it."""
    (tmp_path / "a.yaml").write_text(VALID)
    (tmp_path / "notes.txt").write_text(BROKEN)
    assert run("validate", "-f", tmp_path).exit_code == 0
    result = run("validate", "-f", "-", "-f", tmp_path, stdin=BROKEN)
    assert result.exit_code == 20
    assert "<stdin>:9:5:" in result.stdout


def test_json_for_scripts(run: Run, tmp_path: Path) -> None:
    """One document with a verdict, and path, place and message of each problem."""
    file = tmp_path / "job.yaml"
    file.write_text(BROKEN)
    result = run("validate", "-f", file, "--output", "json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["valid"]) == (20, False)
    (document,) = report["documents"]
    assert (document["kind"], document["name"], document["checked"]) == ("FineTuneJob", "broken", True)
    assert document["problems"][0] == {
        "path": "spec.hyperparameters.learningrate",
        "line": 9,
        "column": 5,
        "message": "unknown field 'learningrate': did you mean 'learningRate'?",
    }


def test_what_is_no_finetunejob_of_this_version_is_named(run: Run) -> None:
    """A wrong apiVersion, a misspelt kind, a missing one, something that is no object."""
    text = "\n---\n".join(
        [
            VALID.replace("v1alpha1", "v1"),
            VALID.replace("kind: FineTuneJob", "kind: FinetuneJob"),
            VALID.replace("apiVersion: tunewright.dev/v1alpha1\n", ""),
            "- 1",
        ]
    )
    result = run("validate", "-f", "-", stdin=text)
    assert result.exit_code == 20
    messages = [line.split(": ", 1)[1] for line in result.stdout.splitlines()]
    assert messages == [
        "apiVersion: 'tunewright.dev/v1' is not served: use tunewright.dev/v1alpha1",
        "kind: 'FinetuneJob' is not a kind of tunewright.dev: use FineTuneJob or AdapterMerge",
        "apiVersion: required, but missing",
        "a Kubernetes object must be a mapping, not list",
    ]


def test_nothing_to_check_is_an_error(run: Run, tmp_path: Path) -> None:
    """A wrong file name in CI must not look like success."""
    (tmp_path / "empty").mkdir()
    for arguments, stdin in ((["nowhere.yaml"], None), ([tmp_path / "empty"], None), (["-"], SECRET), (["-"], "")):
        result = run("validate", "-f", *arguments, stdin=stdin)
        assert result.exit_code == 20
        assert result.stderr.startswith("error: ")


def test_local_paths_are_not_for_the_cluster(run: Run, job_file: Path) -> None:
    """`validate` says what the API server would say."""
    result = run("validate", "-f", job_file)
    assert result.exit_code == 20
    assert "spec.model.uri" in result.stdout


MERGE = """\
apiVersion: tunewright.dev/v1alpha1
kind: AdapterMerge
metadata: {name: merge}
spec:
  adapters: [{fineTuneJob: bot}]
  output: {uri: s3://bucket/merged}
"""


def test_merges_are_checked_too(run: Run, tmp_path: Path) -> None:
    """By their own rules, each with its place; one file may have both kinds."""
    file = tmp_path / "both.yaml"
    file.write_text(f"{VALID}---\n{MERGE}")
    result = run("validate", "-f", file)
    assert result.exit_code == 0
    assert f"{file}: AdapterMerge merge is valid" in result.stdout.splitlines()
    file.write_text(MERGE.replace("fineTuneJob: bot", "fineTuneJob: bot, wieght: 2"))
    result = run("validate", "-f", file)
    assert result.exit_code == 20
    assert f"{file}:5:33: spec.adapters[0].wieght: unknown field 'wieght': did you mean 'weight'?" in result.stdout
