"""What a user gets wrong ends as Failed, with a reason and a message to act on, and is not tried again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.conftest import Jobs, finetunejob
from tests.platform import DATASETS, MODELS, SECRET_NAME


@dataclass(frozen=True)
class Case:
    """One mistake and what is said about it."""

    name: str
    changes: dict[str, Any]
    exit_code: int
    reason: str
    message: tuple[str, ...]


def train(key: str, **dataset: Any) -> dict[str, Any]:
    """Return changes that train on another object."""
    return {"dataset": {"train": [{"uri": f"s3://{DATASETS}/{key}"}], **dataset}}


CASES = [
    Case("wrong-key", {"storage": {"secretName": "s3-wrong"}}, 21, "AccessDenied", ("s3://",)),
    Case(
        "no-bucket",
        {"output": {"uri": "s3://no-such-bucket/x"}},
        20,
        "MissingBucket",
        ("no-such-bucket",),
    ),
    Case("no-file", train("bad/none.jsonl"), 20, "MissingFile", (f"s3://{DATASETS}/bad/none.jsonl",)),
    Case("empty-file", train("bad/empty.jsonl"), 20, "InvalidData", ("empty.jsonl", "empty")),
    Case("broken-json", train("bad/broken.jsonl"), 20, "InvalidData", ("broken.jsonl", "4,711")),
    Case(
        "no-column",
        train("docstrings/train.jsonl", format="PromptCompletion", columns={"prompt": "question"}),
        20,
        "InvalidData",
        ("question", "prompt"),
    ),
    Case("no-config", {"model": {"uri": f"s3://{MODELS}/bad"}}, 20, "InvalidModel", ("config.json",)),
    Case(
        "wrong-endpoint",
        {"storage": {"secretName": SECRET_NAME, "endpoint": "http://10.77.0.1:1"}},
        20,
        "EndpointUnreachable",
        ("http://10.77.0.1:1", "storage.endpoint"),
    ),
]


@pytest.mark.timeout(600)
def test_mistakes_fail_at_once_with_a_message(jobs: Jobs) -> None:
    """Each mistake is named with its place and ends the run in its first attempt, although restarts are allowed."""
    put_bad_objects(jobs)
    jobs.apply(*(finetunejob(case.name, **case.changes, retry={"maxRestarts": 3}) for case in CASES))
    for case in CASES:
        status = jobs.finished(case.name)
        assert status["phase"] == "Failed", case
        assert status["failure"]["exitCode"] == case.exit_code, status["failure"]
        assert status["failure"]["reason"] == case.reason, status["failure"]
        for part in case.message:
            assert part in status["failure"]["message"], status["failure"]
        assert status["attempt"] == 1
        assert not jobs.platform.keys(MODELS, f"e2e/{case.name}/")


def put_bad_objects(jobs: Jobs) -> None:
    """Store the broken data sets, the model without configuration and the Secret with a wrong key."""
    client = jobs.platform.s3()
    good = json.dumps({"prompt": "What does len do?", "completion": " Return the number of items."})
    broken = "\n".join([good] * 4710 + ['{"prompt": "half a row'] + [good] * 10)
    client.put_object(Bucket=DATASETS, Key="bad/broken.jsonl", Body=broken.encode())
    client.put_object(Bucket=DATASETS, Key="bad/empty.jsonl", Body=b"")
    client.put_object(Bucket=MODELS, Key="bad/model.safetensors", Body=b"0")
    wrong = {"AWS_ACCESS_KEY_ID": "tunewright", "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    jobs.platform.apply(
        jobs.namespace,
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3-wrong"}, "stringData": wrong},
    )


def test_misspelt_field_is_rejected_by_the_api_server(jobs: Jobs) -> None:
    """`kubectl apply` refuses a field that does not exist and names it."""
    document = finetunejob("misspelt")
    document["spec"]["hyperparameters"]["learningrate"] = 0.1
    with pytest.raises(AssertionError, match=r'unknown field "spec.hyperparameters.learningrate"'):
        jobs.apply(document)


def test_change_of_an_immutable_field_is_rejected(jobs: Jobs) -> None:
    """Changing the model of an existing FineTuneJob is refused with a remedy."""
    document = finetunejob("immutable", suspend=True)
    jobs.apply(document)
    document["spec"]["method"]["lora"]["rank"] = 8
    with pytest.raises(AssertionError, match=r"spec.method is immutable: create a FineTuneJob with another name"):
        jobs.apply(document)
