"""The Job that is rendered, whole and in its variants."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.operator.builders import SETTINGS, finetunejob
from tunewright_api.run_config import TrainRun
from tunewright_operator.errors import RunTooLarge
from tunewright_operator.kinds import KINDS
from tunewright_operator.naming import job_name, service_name
from tunewright_operator.plan import build_job, build_service, plan_run
from tunewright_operator.settings import Settings

GOLDEN = Path(__file__).parent / "golden"

EVERYTHING: dict[str, Any] = {
    "model": {"uri": "pvc://models/llama"},
    "dataset": {"train": [{"uri": "pvc://data.set/train.jsonl"}], "validation": [{"uri": "s3://datasets/v.jsonl"}]},
    "output": {"uri": "pvc://data.set/out", "hub": {"repository": "org/bot", "revision": "v1"}},
    "storage": {"secretName": "mine", "endpoint": "http://10.0.0.1:9000"},
    "hub": {"secretName": "hf-token", "endpoint": "https://hub.example.com/"},
    "resources": {
        "gpus": 1, "gpuResource": "amd.com/gpu", "cpu": 8, "memory": "64Gi", "ephemeralStorage": "100Gi",
        "sharedMemory": "8Gi",
    },
    "pod": {
        "image": "registry:5000/trainer:2",
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccountName": "cloud",
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
                }
            }
        },
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "labels": {"team": "a"},
        "annotations": {"note": "text"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("smallest", {}),
        ("cpu", {"resources": {"gpus": 0}}),
        ("everything", EVERYTHING),
        ("two-nodes", {"resources": {"nodes": 2, "gpus": 8}}),
    ],
)
def test_golden(name: str, changes: dict[str, Any]) -> None:
    """The whole Job, and the Service of several pods, are as recorded; `UPDATE_GOLDEN=1` records anew, for review."""
    job = finetunejob(**changes)
    manifests = [build_service(job, 1)] if job.spec.resources and job.spec.resources.nodes > 1 else []
    rendered = yaml.safe_dump_all([*manifests, build_job(job, 1, 0, SETTINGS)], sort_keys=False, width=110)
    path = GOLDEN / f"job-{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(rendered)
    assert path.read_text() == rendered


def environment(manifest: dict[str, Any]) -> dict[str, str]:
    """Return the container's variables."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def test_the_trainer_can_read_its_run() -> None:
    """The document in the environment parses, and names attempt and platform storage."""
    settings = Settings(storage_endpoint="http://s3:9000", storage_region="eu-west-1", storage_path_style=True)
    run = TrainRun.model_validate_json(environment(build_job(finetunejob(), 3, 0, settings))["TUNEWRIGHT_RUN"])
    assert (run.name, run.namespace, run.attempt) == ("bot", "team-a", 3)
    assert (run.storage.endpoint, run.storage.region, run.storage.path_style) == ("http://s3:9000", "eu-west-1", True)


@pytest.mark.parametrize(
    ("objective", "halvings", "expected"),
    [
        ("SFT", 0, (8, 2)),
        ("SFT", 1, (4, 4)),
        ("SFT", 3, (1, 16)),
        ("SFT", 9, (1, 16)),
        ("KTO", 9, (2, 8)),
    ],
)
def test_halving_keeps_the_batch(objective: str, halvings: int, expected: tuple[int, int]) -> None:
    """Half the micro-batch comes with twice the accumulation, down to one row, or two where rows are compared."""
    batch = {"batchSize": 8, "gradientAccumulationSteps": 2}
    spec = finetunejob(hyperparameters=batch, objective={"type": objective})
    resolved = plan_run(spec, 1, halvings, SETTINGS).hyperparameters
    assert (resolved.batch_size, resolved.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("changes", "secret"),
    [
        ({}, "platform"),
        ({"storage": {"secretName": "own"}}, "own"),
        (
            {
                "dataset": {"train": [{"uri": "pvc://data/train.jsonl"}]},
                "output": {"uri": "pvc://data/out"},
            },
            None,
        ),
    ],
)
def test_credentials(changes: dict[str, Any], secret: str | None) -> None:
    """The spec's Secret wins; the platform's is used only where S3 is."""
    manifest = build_job(finetunejob(**changes), 1, 0, Settings(storage_secret_name="platform"))
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert container.get("envFrom") == ([{"secretRef": {"name": secret}}] if secret else None)


def test_a_reward_model_is_an_input() -> None:
    """Its claim is mounted, read-only, and in S3 it needs credentials."""
    volumes: dict[str, Any] = {
        "model": {"uri": "pvc://models/base"},
        "dataset": {"train": [{"uri": "pvc://data/train.jsonl"}]},
        "output": {"uri": "pvc://data/out"},
    }
    containers = []
    for uri in ("pvc://judges/a", "s3://models/judge"):
        reward = {"type": "Model", "model": {"uri": uri}}
        job = finetunejob(**volumes, objective={"type": "GRPO", "grpo": {"rewards": [reward]}})
        manifest = build_job(job, 1, 0, Settings(storage_secret_name="platform"))
        containers += manifest["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount.get("readOnly") for mount in containers[0]["volumeMounts"]}
    assert mounts["/mnt/pvc/judges"] is True
    assert "envFrom" not in containers[0]
    assert containers[1]["envFrom"] == [{"secretRef": {"name": "platform"}}]


HUB_OUTPUT = {"uri": "pvc://data/out", "hub": {"repository": "org/bot"}}
ELSEWHERE = {"model": {"uri": "pvc://data/base"}, "output": {"uri": "pvc://data/out"}}


@pytest.mark.parametrize(
    ("changes", "secret"),
    [
        ({}, {"name": "platform", "key": "token", "optional": True}),
        ({"hub": {"secretName": "own"}}, {"name": "own", "key": "token"}),
        ({**ELSEWHERE, "output": HUB_OUTPUT}, {"name": "platform", "key": "token", "optional": True}),
        (ELSEWHERE, None),
        ({"hub": {"endpoint": "https://another.example.com"}}, None),
    ],
)
def test_the_hub_token(changes: dict[str, Any], secret: dict[str, Any] | None) -> None:
    """The spec's Secret wins; the platform's may be missing, and goes to no other hub than the platform's."""
    manifest = build_job(finetunejob(**changes), 1, 0, Settings(hub_secret_name="platform"))
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    found = [entry["valueFrom"] for entry in container["env"] if entry["name"] == "HF_TOKEN"]
    assert found == ([{"secretKeyRef": secret}] if secret else [])


def test_the_tracking_server_gets_its_own_credentials_and_no_more() -> None:
    """Three keys of the Secret by name, none of which must be there; nothing without a Secret."""
    server = {"uri": "http://mlflow:5000"}
    for secret, expected in ((None, []), ("mlflow", ["TOKEN", "USERNAME", "PASSWORD"])):
        tracking = {"mlflow": {**server, **({"secretName": secret} if secret else {})}}
        (container,) = build_job(finetunejob(tracking=tracking), 1, 0, SETTINGS)["spec"]["template"]["spec"][
            "containers"
        ]
        entries = [entry for entry in container["env"] if entry["name"].startswith("MLFLOW_")]
        assert [entry["name"] for entry in entries] == [f"MLFLOW_TRACKING_{name}" for name in expected]
        for entry in entries:
            reference = {"name": secret, "key": entry["name"], "optional": True}
            assert entry["valueFrom"] == {"secretKeyRef": reference}


def test_user_labels_do_not_hide_ours() -> None:
    """The operator finds its pods by its own labels, whatever the user adds."""
    labels = build_job(finetunejob(pod={"labels": {"app.kubernetes.io/managed-by": "me"}}), 1, 0, SETTINGS)["spec"][
        "template"
    ]["metadata"]["labels"]
    assert labels["app.kubernetes.io/managed-by"] == "tunewright-operator"
    assert labels["tunewright.dev/finetunejob"] == "bot"


def test_a_document_that_does_not_fit_is_refused() -> None:
    """An environment variable has its limits; the message says what to shorten."""
    template = "\N{SNOWMAN}" * 32768
    spec = finetunejob(model={"uri": "hf://a/b", "chatTemplate": template})
    with pytest.raises(RunTooLarge, match=r"65536 are allowed: shorten model\.chatTemplate"):
        build_job(spec, 1, 0, SETTINGS)


def test_names_fit_a_host_name() -> None:
    """The longest Job name leaves room for the pod's suffix of six characters, and its Service's name fits too."""
    for kind in KINDS:
        longest = job_name(kind, "n" * 45, 999)
        assert len(longest) + 6 <= 63
        assert len(f"{longest}-63") <= 63
        assert len(service_name(longest)) <= 63


def test_a_service_s_name_begins_with_a_letter() -> None:
    """A FineTuneJob's may begin with a digit, which the API server takes for Jobs but not for Services."""
    assert build_service(finetunejob("7b-chat"), 2)["metadata"]["name"] == "ftj-7b-chat-train-2"


def test_pods_of_several_nodes_find_the_first_one() -> None:
    """Its name is made of what Job and Service really are called, and the Service finds these pods and no others."""
    job = finetunejob(resources={"nodes": 2})
    manifest, service = build_job(job, 3, 0, SETTINGS), build_service(job, 3)
    template, name = manifest["spec"]["template"], service["metadata"]["name"]
    address = f"{manifest['metadata']['name']}-0.{name}"
    variables = environment(manifest)
    assert (variables["PET_MASTER_ADDR"], variables["PET_MASTER_PORT"]) == (address, "29500")
    assert template["spec"]["subdomain"] == name
    selector = service["spec"]["selector"].items()
    assert selector <= template["metadata"]["labels"].items()
    for other in (
        build_job(job, 2, 0, SETTINGS),
        build_job(finetunejob(uid="uid-2", resources={"nodes": 2}), 3, 0, SETTINGS),
    ):
        assert not selector <= other["spec"]["template"]["metadata"]["labels"].items()


def test_one_pod_is_told_of_no_other() -> None:
    """Neither names nor ports, however many GPUs it has."""
    manifest = build_job(finetunejob(resources={"gpus": 8}), 1, 0, SETTINGS)
    assert not [name for name in environment(manifest) if name.startswith("PET_")]
    assert "subdomain" not in manifest["spec"]["template"]["spec"]
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_the_manifest_is_json() -> None:
    """Nothing but plain values goes to the API server."""
    json.dumps(build_job(finetunejob(**EVERYTHING), 1, 0, SETTINGS))
