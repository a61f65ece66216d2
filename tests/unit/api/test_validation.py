"""Messages about invalid documents: all problems, each with its place and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api.builders import job_document
from tunewright_api.validation import InvalidDocument, parse_finetunejob


def problems(document: dict[str, Any]) -> dict[str, str]:
    """Return message by path."""
    with pytest.raises(InvalidDocument) as caught:
        parse_finetunejob(document)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_a_valid_document_parses() -> None:
    """The smallest one is valid, and what a server adds does not matter."""
    document = job_document()
    document["metadata"] |= {"uid": "u", "resourceVersion": "7", "managedFields": []}
    document["status"] = {"phase": "Running", "fieldOfALaterVersion": 1}
    assert parse_finetunejob(document).metadata.uid == "u"


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"modl": {}}, "spec.modl", "did you mean 'model'?"),
        ({"dataset": {"trian": []}}, "spec.dataset.trian", "did you mean 'train'?"),
        (
            {"dataset": {"train": [{"uri": "s3://bucket/a.jsonl", "maxSample": 3}]}},
            "spec.dataset.train[0].maxSample",
            "did you mean 'maxSamples'?",
        ),
        ({"hyperparameters": {"learning_rate": 1e-3}}, "spec.hyperparameters.learning_rate", "'learningRate'?"),
        ({"method": {"type": "LoRA", "lora": {"r": 8}}}, "spec.method.lora.r", "known here are alpha, bias, dropout"),
    ],
)
def test_a_misspelt_field_is_met_with_the_nearest_name(changes: dict[str, Any], path: str, message: str) -> None:
    """Where nothing is near, all known names are given."""
    assert message in problems(job_document(**changes))[path]


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"output": None}, "spec.output", "required, but missing"),
        ({"model": {"uri": "hf:/x/y"}}, "spec.model.uri", "use hf://organisation/name"),
        ({"output": {"uri": "s3://bucket"}}, "spec.output.uri", "use s3://bucket/prefix"),
        ({"dataset": {"train": [{"uri": "s3://b/../x"}]}}, "spec.dataset.train[0].uri", "is not a data URI"),
        ({"dataset": {"train": []}}, "spec.dataset.train", "at least 1"),
        ({"hyperparameters": {"learningRate": "2e-4"}}, "spec.hyperparameters.learningRate", "remove the quotes"),
        ({"hyperparameters": {"batchSize": 0}}, "spec.hyperparameters.batchSize", "greater than or equal to 1"),
        ({"resources": {"memory": "lots"}}, "spec.resources.memory", "such as 4, 500m or 16Gi"),
        ({"ttlAfterFinished": "1 day"}, "spec.ttlAfterFinished", "such as 90s or 12h"),
        ({"method": {"type": "QLoRA"}}, "spec.method", "QLoRA needs it"),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(changes: dict[str, Any], path: str, message: str) -> None:
    """Path as it stands in the document, message with what would be right."""
    assert message in problems(job_document(**changes))[path]


def test_all_problems_come_at_once() -> None:
    """Nobody has to run the check five times for five mistakes."""
    document = job_document(
        model={"uri": "x"}, outputs={}, hyperparameters={"seed": -1, "epochs": 0}, method={"type": "Full", "lora": {}}
    )
    assert set(problems(document)) == {
        "spec.model.uri",
        "spec.outputs",
        "spec.hyperparameters.seed",
        "spec.hyperparameters.epochs",
        "spec.method",
    }


@pytest.mark.parametrize("field", ["model", "train", "output"])
def test_local_paths_are_only_for_local_runs(field: str) -> None:
    """A path that starts with / or ./ passes where `local` is set, and nowhere else."""
    by_field: dict[str, dict[str, Any]] = {
        "model": {"model": {"uri": "/models/base"}},
        "train": {"dataset": {"train": [{"uri": "./rows.jsonl"}]}},
        "output": {"output": {"uri": "../results"}},
    }
    document = job_document(**by_field[field])
    assert parse_finetunejob(document, local=True)
    assert len(problems(document)) == 1


@pytest.mark.parametrize("name", ["a" * 46, "Support", "support.bot", "-x", "x-"])
def test_names_must_leave_room_for_jobs_and_pods(name: str) -> None:
    """45 characters of a host name."""
    with pytest.raises(InvalidDocument, match=r"metadata\.name"):
        parse_finetunejob(job_document(name))
    assert parse_finetunejob(job_document("a" * 45))
