"""What happens to a run when the platform gets in its way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.cluster import Cluster, processes
from tests.e2e.conftest import Document, Jobs, finetunejob
from tests.platform import MODELS, OPERATOR_NAMESPACE, SECRET_NAME
from tests.s3_proxy import proxied

LONG = {"maxSteps": 100000, "batchSize": 2, "gradientAccumulationSteps": 1, "maxSequenceLength": 64}


def running(status: Document) -> bool:
    """Tell whether the pod trains."""
    return bool(status.get("progress", {}).get("step"))


def pods_ready(status: Document) -> Document:
    """Return the PodsReady condition."""
    found: Document = next((c for c in status.get("conditions", []) if c["type"] == "PodsReady"), {})
    return found


def test_pod_problems_are_told_in_the_status(jobs: Jobs) -> None:
    """A missing Secret, an image that does not exist and a GPU that nobody has are named while the pod waits."""
    jobs.apply(
        finetunejob("no-secret", storage={"secretName": "not-there"}),
        finetunejob("no-image", pod={"image": f"{jobs.platform.cluster.registry}/no/such-image:1"}),
        finetunejob("no-gpu", resources={"gpus": 1}),
    )
    expected = {
        "no-secret": ("ConfigError", "not-there"),
        "no-image": ("ImagePullFailed", "no/such-image"),
        "no-gpu": ("Unschedulable", "nvidia.com/gpu"),
    }
    for name, (reason, part) in expected.items():
        status = jobs.wait(name, lambda s, wanted=reason: pods_ready(s).get("reason") == wanted, timeout=90)  # type: ignore[misc]
        assert part in pods_ready(status)["message"]
        jobs.platform.kubectl("delete", "ftj", name, "-n", jobs.namespace)


@pytest.mark.timeout(600)
def test_out_of_memory_is_named_and_tried_again_within_the_limit(jobs: Jobs) -> None:
    """A pod that goes over its memory limit is started again once, then the run fails and names the limit."""
    small = {"gpus": 0, "cpu": "500m", "memory": "420Mi", "ephemeralStorage": "2Gi"}
    jobs.apply(finetunejob("small-memory", resources=small, retry={"maxRestarts": 1}))
    status = jobs.finished("small-memory", timeout=400)
    assert status["phase"] == "Failed"
    assert [a["cause"] for a in status["attempts"]] == ["OutOfMemory", "OutOfMemory"]
    assert "resources.memory" in status["failure"]["message"]


@pytest.mark.timeout(600)
def test_deleted_pod_is_replaced_by_a_new_attempt_and_a_deleted_job_leaves_nothing(jobs: Jobs) -> None:
    """A pod deleted by hand is named as cause of attempt 2; deleting the CR removes pods and publishes nothing."""
    jobs.apply(finetunejob("deleted", hyperparameters=LONG, retry={"maxRestarts": 1}))
    jobs.wait("deleted", running)
    jobs.platform.kubectl("delete", "pod", jobs.pods("deleted")[0]["metadata"]["name"], "-n", jobs.namespace)
    status = jobs.wait("deleted", lambda s: s.get("attempt") == 2)
    assert status["attempts"][0]["cause"] in ("PodDeleted", "Preempted")
    jobs.platform.kubectl("delete", "ftj", "deleted", "-n", jobs.namespace)
    deadline = time.monotonic() + 90
    while jobs.pods("deleted") and time.monotonic() < deadline:
        time.sleep(1)
    assert jobs.pods("deleted") == []
    assert not [key for key in jobs.platform.keys(MODELS, "e2e/deleted/") if key.endswith("manifest.json")]


@pytest.mark.timeout(600)
def test_eviction_is_free(jobs: Jobs) -> None:
    """An evicted pod starts a new attempt even where no restart is allowed."""
    jobs.apply(finetunejob("evicted", hyperparameters=LONG))
    jobs.wait("evicted", running)
    pod = jobs.pods("evicted")[0]["metadata"]["name"]
    eviction = {
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": jobs.namespace}
    }  # fmt: skip
    path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod}/eviction"
    jobs.platform.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    status = jobs.wait("evicted", lambda s: s.get("attempt") == 2)
    assert status["attempts"][0]["cause"] == "Evicted"
    assert status.get("restarts", 0) == 0
    jobs.platform.kubectl("delete", "ftj", "evicted", "-n", jobs.namespace)


@pytest.mark.timeout(600)
def test_suspend_removes_the_pod_and_resume_runs_to_the_end(jobs: Jobs) -> None:
    """`suspend: true` ends the pod, `suspend: false` starts an attempt that completes; progress was seen on the way."""
    jobs.apply(finetunejob("paused", suspend=True))
    jobs.wait("paused", lambda s: s.get("phase") == "Suspended")
    assert jobs.pods("paused") == []
    jobs.platform.kubectl(
        "patch", "ftj", "paused", "-n", jobs.namespace, "--type=merge", "-p", '{"spec":{"suspend":false}}'
    )
    status = jobs.finished("paused")
    assert status["phase"] == "Complete"


@pytest.mark.timeout(600)
def test_operator_killed_in_the_middle_changes_nothing(jobs: Jobs) -> None:
    """The operator's pod is killed while a run trains: one Job, one attempt, Complete."""
    jobs.apply(finetunejob("survivor", hyperparameters={**LONG, "maxSteps": 60}))
    jobs.wait("survivor", lambda s: s.get("jobRef"))
    jobs.platform.kubectl(
        "delete",
        "pod",
        "-n",
        OPERATOR_NAMESPACE,
        "-l",
        "app.kubernetes.io/name=tunewright",
        "--force",
        "--grace-period=0",
    )
    status = jobs.finished("survivor")
    assert (status["phase"], status["attempt"]) == ("Complete", 1)


def test_trainer_pod_is_restricted(jobs: Jobs) -> None:
    """The pod carries no token, no root, no writable root file system; the namespace enforces `restricted`."""
    jobs.apply(finetunejob("restricted", hyperparameters=LONG, storage={"secretName": SECRET_NAME}))
    jobs.wait("restricted", lambda s: jobs.pods("restricted"))
    spec = jobs.pods("restricted")[0]["spec"]
    assert spec["automountServiceAccountToken"] is False
    container = spec["containers"][0]["securityContext"]
    assert container["readOnlyRootFilesystem"] is True
    assert container["capabilities"] == {"drop": ["ALL"]}
    jobs.platform.kubectl("delete", "ftj", "restricted", "-n", jobs.namespace)


@pytest.mark.timeout(600)
def test_s3_that_fails_for_a_while_only_delays(jobs: Jobs) -> None:
    """S3 answers 500 and 503 and drops connections while inputs are read, and is away when the result is published."""
    assert jobs.platform.cluster.s3 is not None
    with proxied(jobs.platform.cluster.s3, urlsplit(jobs.platform.endpoint).hostname or "") as proxy:
        proxy.faults = deque(["pass", "503", "drop", "pass", "500"] * 4)
        storage = {"secretName": SECRET_NAME, "endpoint": proxy.endpoint, "pathStyle": True}
        jobs.apply(finetunejob("flaky-s3", hyperparameters={**LONG, "maxSteps": 40}, storage=storage))
        jobs.wait("flaky-s3", running)
        assert not proxy.faults
        proxy.always = "503"
        read = len(proxy.requests)
        jobs.wait("flaky-s3", lambda _: len(proxy.requests) >= read + 8)
        proxy.always = None
        status = jobs.finished("flaky-s3")
    assert (status["phase"], status["attempt"]) == ("Complete", 1)


@contextlib.contextmanager
def stopped_kubelet(cluster: Cluster) -> Iterator[None]:
    """Stop the kubelet, so that the node no longer answers; its pods are left as they are."""
    kubelets = [p.pid for p in processes.running(cluster.kubeconfig.parent) if p.component == "kubelet"]
    if not kubelets:
        pytest.skip("the kubelet of this cluster is not a process of this machine")
    for pid in kubelets:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in kubelets:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(600)
def test_lost_node_is_named_and_costs_no_restart(jobs: Jobs) -> None:
    """A pod that nobody ends, because its node does not answer, is given up; the next one waits until it is gone.

    The deletion is the test's own, so that nothing hangs on when, and whether, the only node's pods are evicted.
    """
    jobs.apply(finetunejob("lost-node", hyperparameters=LONG))
    jobs.wait("lost-node", running)
    (pod,) = jobs.pods("lost-node")
    with stopped_kubelet(jobs.platform.cluster):
        deleting = ("delete", "pod", pod["metadata"]["name"], "--grace-period=1", "--wait=false")
        jobs.platform.kubectl(*deleting, "-n", jobs.namespace)
        status = jobs.wait("lost-node", lambda s: s.get("attempts"))
        assert status["attempts"][0]["cause"] == "NodeLost"
        assert "does not answer" in status["attempts"][0]["message"]
        assert len(jobs.pods("lost-node")) == 1
    status = jobs.wait("lost-node", lambda s: s.get("attempt", 1) > 1 and running(s))
    assert status.get("restarts", 0) == 0
    jobs.platform.kubectl("delete", "ftj", "lost-node", "-n", jobs.namespace)
