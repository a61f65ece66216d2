"""The run document and the key that names a run by its content."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.api.builders import spec
from tunewright_api.run_config import (
    HubSettings,
    StorageSettings,
    TrainRun,
    build_train_run,
    resolve_hub,
    resolve_storage,
    run_key,
)


def run(attempt: int = 1, name: str = "support-bot", **changes: Any) -> TrainRun:
    """Return the run document of a spec with changes."""
    return build_train_run(
        spec(**changes), name=name, namespace="team-a", attempt=attempt, storage=StorageSettings(region="eu-west-1")
    )


def key(document: TrainRun, model: str = "c0ffee", data: str = "etag-10") -> str:
    """Return the run key with one data file."""
    return run_key(document, model_version=model, data_versions={"s3://bucket/train.jsonl": data})


def test_the_document_survives_the_way_to_the_trainer() -> None:
    """What the trainer parses is what the operator built, and its form is canonical."""
    document = run(method={"type": "QLoRA", "quantization": {}}, hyperparameters={"learningRate": 2e-4})
    assert TrainRun.model_validate_json(document.to_json()) == document
    assert json.dumps(json.loads(document.to_json()), sort_keys=True, separators=(",", ":")) == document.to_json()


def test_unknown_fields_are_refused() -> None:
    """A trainer that is older than the operator says so instead of training something else."""
    with pytest.raises(ValueError, match="surprise"):
        TrainRun.model_validate({**run().document(), "surprise": 1})


@pytest.mark.parametrize(
    "other",
    [
        {"attempt": 2},
        {"name": "another"},
        {"output": {"uri": "s3://elsewhere/output"}},
        {"storage": {"secretName": "other-credentials", "endpoint": "http://s3:8333"}},
        {"resources": {"memory": "32Gi"}},
        {"resources": {"nodes": 1, "gpus": 1}},
        {"retry": {"maxRestarts": 0, "timeouts": {"stall": "10m"}}},
        {"suspend": True},
        {"hub": {"secretName": "hf-token", "endpoint": "https://hub.example.com"}},
        {"output": {"uri": "s3://bucket/output", "hub": {"repository": "org/name"}}},
        {"pod": {"nodeSelector": {"pool": "gpu"}}},
    ],
)
def test_what_does_not_shape_the_result_does_not_count(other: dict[str, Any]) -> None:
    """A run in another place, or tried again, keeps its key and finds the result that is there."""
    assert key(run(**other)) == key(run())


@pytest.mark.parametrize(
    "other",
    [
        {"hyperparameters": {"seed": 1}},
        {"hyperparameters": {"learningRate": 1e-3}},
        {"method": {"type": "LoRA", "lora": {"rank": 8}}},
        {"method": {"type": "Full"}},
        {"model": {"uri": "hf://organisation/other"}},
        {"dataset": {"train": [{"uri": "s3://bucket/train.jsonl", "maxSamples": 5}]}},
        {"dataset": {"train": [{"uri": "hf://datasets/org/name/train.jsonl", "revision": "v1"}]}},
        {"dataset": {"train": [{"uri": "s3://bucket/train.jsonl"}], "validationFraction": 0.5}},
        {"resources": {"nodes": 2}},
        {"resources": {"gpus": 2}},
    ],
)
def test_what_shapes_the_result_counts(other: dict[str, Any]) -> None:
    """Another model, method, argument or choice of rows is another run."""
    assert key(run(**other)) != key(run())


@pytest.mark.parametrize(
    ("resources", "scale"),
    [(None, (1, 1)), ({"gpus": 0}, (1, 1)), ({"gpus": 8}, (1, 8)), ({"nodes": 2, "gpus": 0}, (2, 1)),
     ({"nodes": 4, "gpus": 8}, (4, 8))],
)  # fmt: skip
def test_every_gpu_has_a_process(resources: dict[str, Any] | None, scale: tuple[int, int]) -> None:
    """And the global batch counts them all."""
    document = run(resources=resources, hyperparameters={"batchSize": 2, "gradientAccumulationSteps": 3})
    assert (document.nodes, document.processes) == scale
    assert document.world_size == scale[0] * scale[1]
    assert document.global_batch_size == 6 * scale[0] * scale[1]


def test_new_content_under_the_same_name_is_another_run() -> None:
    """Versions of model and data count, not only their names."""
    assert key(run(), model="decaf") != key(run())
    assert key(run(), data="etag-11") != key(run())


def test_a_default_that_is_spelt_out_is_the_same_run() -> None:
    """The key is made of resolved values."""
    assert key(run(hyperparameters={"seed": 42, "batchSize": 4})) == key(run())


def test_the_key_of_a_fixed_run_is_pinned() -> None:
    """A change of this value orphans every published result: it needs a new RECIPE_VERSION and a release note."""
    assert key(run()) == "d72ac26f806f8e29"


@pytest.mark.parametrize(
    ("storage", "platform", "expected"),
    [
        (None, {}, (None, "us-east-1", False)),
        (None, {"endpoint": "http://p:1", "path_style": True}, ("http://p:1", "us-east-1", True)),
        ({"endpoint": "http://own:1"}, {"endpoint": "http://p:1"}, ("http://own:1", "us-east-1", True)),
        ({"endpoint": "http://own:1", "pathStyle": False}, {}, ("http://own:1", "us-east-1", False)),
        ({"secretName": "s3"}, {"endpoint": "http://p:1", "path_style": True}, ("http://p:1", "us-east-1", True)),
        ({"region": "eu-west-1"}, {"region": "us-west-2"}, (None, "eu-west-1", False)),
    ],
)
def test_the_spec_lies_over_the_platform(
    storage: dict[str, Any] | None, platform: dict[str, Any], expected: tuple[str | None, str, bool]
) -> None:
    """Every field falls back on its own; an endpoint of one's own means path style unless told otherwise."""
    resolved = resolve_storage(spec(storage=storage), StorageSettings(**platform))
    assert (resolved.endpoint, resolved.region, resolved.path_style) == expected


@pytest.mark.parametrize(
    ("hub", "expected"),
    [
        (None, ("https://hub.example.com", "platform")),
        ({"secretName": "own"}, ("https://hub.example.com", "own")),
        ({"endpoint": "https://hub.example.com/"}, ("https://hub.example.com", "platform")),
        ({"endpoint": "https://other.example.com"}, ("https://other.example.com", None)),
        ({"endpoint": "https://other.example.com", "secretName": "own"}, ("https://other.example.com", "own")),
    ],
)
def test_the_platform_s_token_goes_to_the_platform_s_hub(
    hub: dict[str, Any] | None, expected: tuple[str, str | None]
) -> None:
    """Whoever names another hub gives it a token of his own."""
    platform = HubSettings(endpoint="https://hub.example.com", secret_name="platform")
    resolved = resolve_hub(spec(hub=hub), platform)
    assert (resolved.endpoint, resolved.secret_name) == expected
