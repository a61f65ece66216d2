"""Training in several pods at once: they find each other, and train to what one pod would have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.conftest import Document, Jobs, finetunejob
from tests.platform import DATASETS, MODELS, OPERATOR_NAMESPACE, TINY

# Without dropout and in float32, so that nothing but the order of additions differs.
FLOAT32 = {"uri": f"s3://{MODELS}/{TINY}", "dtype": "Float32"}
METHOD = {"type": "LoRA", "lora": {"rank": 4, "dropout": 0.0}}
ROWS = {
    "train": [{"uri": f"s3://{DATASETS}/docstrings/train.jsonl", "maxSamples": 64}],
    "validation": [{"uri": f"s3://{DATASETS}/docstrings/validation.jsonl", "maxSamples": 8}],
}
RESOURCES = {"gpus": 0, "cpu": "500m", "memory": "3Gi", "ephemeralStorage": "2Gi"}

LOOK_UP = """
import os, socket, time
other = f"pair-{1 - int(os.environ['JOB_COMPLETION_INDEX'])}.pair"
deadline = time.monotonic() + 60
for name in (other, f"{other}.{os.environ['NAMESPACE']}.svc.cluster.local"):
    while True:
        try:
            print(name, socket.gethostbyname(name))
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
"""


def pair(image: str, namespace: str) -> tuple[Document, Document]:
    """Return a Service and two pods behind it that look each other up."""
    container = {
        "name": "look-up",
        "image": image,
        "command": ["python3", "-c", LOOK_UP],
        "env": [{"name": "NAMESPACE", "value": namespace}],
        "resources": {"requests": {"cpu": "50m"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    template = {
        "metadata": {"labels": {"pair": "yes"}},
        "spec": {
            "restartPolicy": "Never",
            "subdomain": "pair",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        },
    }
    job = {"completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimit": 0, "template": template}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"pair": "yes"}}
    return (
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "pair"}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pair"}, "spec": job},
    )


@pytest.mark.timeout(600)
def test_pods_find_each_other_by_name(jobs: Jobs) -> None:
    """Pods of an Indexed Job behind a headless Service know each other's addresses, by short and by full names."""
    kubectl = jobs.platform.kubectl
    image = kubectl(
        "get",
        "deployment",
        "-n",
        OPERATOR_NAMESPACE,
        "-o",
        "jsonpath={.items[0].spec.template.spec.containers[0].image}",
    )
    jobs.platform.apply(jobs.namespace, *pair(image, jobs.namespace))
    try:
        kubectl("wait", "--for=condition=Complete", "job/pair", "-n", jobs.namespace, "--timeout=90s")
        pods = json.loads(kubectl("get", "pods", "-n", jobs.namespace, "-l", "pair=yes", "-o", "json"))["items"]
        addresses = {pod["spec"]["hostname"]: pod["status"]["podIP"] for pod in pods}
        for pod in pods:
            other = "pair-1" if pod["spec"]["hostname"] == "pair-0" else "pair-0"
            lines = kubectl("logs", pod["metadata"]["name"], "-n", jobs.namespace).splitlines()
            assert [line.split()[1] for line in lines[:2]] == [addresses[other]] * 2
    finally:
        kubectl("delete", "job,service", "pair", "-n", jobs.namespace)


def metrics(jobs: Jobs, status: Document) -> dict[str, list[float]]:
    """Return the losses of a published run by their kind, in the order of the steps."""
    bucket, key = status["output"]["uri"].removeprefix("s3://").split("/", 1)
    text = jobs.platform.s3().get_object(Bucket=bucket, Key=f"{key.rpartition('/')[0]}/metrics.jsonl")["Body"].read()
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    return {kind: [line[kind] for line in lines if kind in line] for kind in ("loss", "evalLoss")}


@pytest.mark.timeout(900)
def test_two_pods_train_like_one(jobs: Jobs) -> None:
    """Two nodes with one micro-batch each train to the losses of one node with two: within 1 in 1,000 at each step.

    The rows of a step are the same; sums over two processes are added in another order, which 6 steps make larger.
    """
    both = {"maxSteps": 6, "batchSize": 2, "maxSequenceLength": 64, "learningRate": 1e-3}
    shared: Document = {"model": FLOAT32, "method": METHOD, "dataset": ROWS}
    one = finetunejob("scale-one", **shared, hyperparameters={**both, "gradientAccumulationSteps": 2})
    two = finetunejob(
        "scale-two",
        **shared,
        hyperparameters={**both, "gradientAccumulationSteps": 1},
        resources={**RESOURCES, "nodes": 2},
    )
    jobs.apply(two, one)
    statuses = {name: jobs.finished(name, timeout=800) for name in ("scale-two", "scale-one")}
    for status in statuses.values():
        assert status["phase"] == "Complete", status
        assert status["progress"]["step"] == status["plan"]["totalSteps"] == 6
    assert statuses["scale-one"]["runKey"] != statuses["scale-two"]["runKey"]
    expected, found = (metrics(jobs, statuses[name]) for name in ("scale-one", "scale-two"))
    assert len(expected["loss"]) == 6
    assert expected["loss"][-1] < expected["loss"][0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["evalLoss"] == pytest.approx(expected["evalLoss"], rel=1e-3)
    pods = jobs.pods("scale-two")
    assert sorted(pod["spec"]["hostname"] for pod in pods) == ["scale-two-train-1-0", "scale-two-train-1-1"]
    ends = [pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] for pod in pods]
    assert ends == [0, 0]
    manifests = [key for key in jobs.platform.keys(MODELS, "e2e/scale-two/") if key.endswith("/manifest.json")]
    assert len(manifests) == 1


@pytest.mark.timeout(900)
def test_the_loss_of_one_pod_ends_the_attempt_of_both(jobs: Jobs) -> None:
    """A follower that is deleted is the named cause, not the pod that lost it; the next attempt trains with both."""
    hyperparameters = {"maxSteps": 100000, "batchSize": 2, "gradientAccumulationSteps": 1, "maxSequenceLength": 64}
    jobs.apply(finetunejob("scale-lost", hyperparameters=hyperparameters, resources={**RESOURCES, "nodes": 2}))
    jobs.wait("scale-lost", lambda s: s.get("progress", {}).get("step"), timeout=400)
    follower = next(pod for pod in jobs.pods("scale-lost") if pod["spec"]["hostname"].endswith("-1"))
    jobs.platform.kubectl("delete", "pod", follower["metadata"]["name"], "-n", jobs.namespace, "--wait=false")
    status = jobs.wait("scale-lost", lambda s: s.get("attempts"), timeout=200)
    assert status["attempts"][0]["cause"] == "PodDeleted"
    assert status["attempts"][0]["message"].startswith("node 1: ")
    status = jobs.wait("scale-lost", lambda s: s.get("attempt") == 2 and s.get("progress", {}).get("step"), timeout=400)
    assert (status.get("restarts", 0), status["freeRestarts"]) == (0, 1)
    jobs.platform.kubectl("delete", "ftj", "scale-lost", "-n", jobs.namespace)
    for attempt in (1, 2):
        gone = ("wait", "--for=delete", f"service/ftj-scale-lost-train-{attempt}", "--timeout=60s")
        jobs.platform.kubectl(*gone, "-n", jobs.namespace)
