"""Runs on two nodes, against a real API server with the real Job controller; the test plays the kubelets."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.integration.conftest import Api, Operator, container, finetunejob, wait
from tests.integration.proxy import Proxy
from tests.integration.test_lifecycle import REPORT, finish_deletion

TIME = "2026-01-01T00:00:00Z"
SERVICE = "ftj-bot-train-1"
FOLLOWER = {"version": 1, "exitCode": 0, "reason": "TookPart", "message": "pod 0 reports the result"}
PEER_LOST = {"version": 1, "exitCode": 1, "reason": "PeerLost", "message": "lost the connection to node 1"}


def create(api: Api, name: str = "bot", **changes: Any) -> None:
    """Create a FineTuneJob on two nodes."""
    api.create(finetunejob(name, **{"resources": {"nodes": 2, "memory": "3Gi"}, **changes}))


def start(api: Api, node: int) -> None:
    """Let a pod run on a node."""
    pod = api.pod("bot", node=node)
    api.bind(pod)
    api.play_kubelet(pod, phase="Running", containerStatuses=[container(running={"startedAt": TIME})])


def end(api: Api, node: int, exit_code: int, report: dict[str, Any] | None = None, **how: Any) -> None:
    """Let a pod end."""
    api.end_pod(api.pod("bot", node=node), exit_code, json.dumps(report) if report else "", **how)


def test_two_pods_to_complete(api: Api, operator: Operator, proxy: Proxy) -> None:
    """Pods get numbers, names and a Service before them; the run is the first one's, and costs two more requests."""
    before = len(proxy.requests)
    create(api)
    start(api, 1)
    wait(lambda: api.condition("bot", "PodsReady").get("message") == "1/2 pods ready", "the count")
    assert api.status("bot")["phase"] == "Pending"
    start(api, 0)
    api.until("bot", lambda s: s.get("phase") == "Running")
    ready = api.condition("bot", "PodsReady")
    assert (ready["status"], ready["message"]) == ("True", "2/2 pods ready")
    end(api, 1, 0, FOLLOWER, ended_as="Completed")
    time.sleep(1)
    assert api.status("bot")["phase"] == "Running"
    end(api, 0, 0, REPORT, ended_as="Completed")
    status = api.until("bot", lambda s: s.get("phase") == "Complete")
    assert status["output"]["uri"] == REPORT["output"]["uri"]
    assert len(status["attempts"]) == 1
    used = [r for r in proxy.requests[before:] if r.namespace == api.namespace]
    created = [r.resource for r in used if r.verb == "create" and r.resource != "events"]
    assert created == ["services", "jobs"]
    assert len(used) <= 8, used


def test_pods_are_reached_by_the_names_they_are_told(api: Api, operator: Operator) -> None:
    """Host name, subdomain and Service fit together, and the API server fills in the rank."""
    create(api)
    pods = [api.pod("bot", node=node) for node in (0, 1)]
    service = api.get("services", SERVICE)
    assert service is not None
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert [owner["kind"] for owner in service["metadata"]["ownerReferences"]] == ["FineTuneJob"]
    for rank, pod in enumerate(pods):
        spec, metadata = pod["spec"], pod["metadata"]
        assert (spec["hostname"], spec["subdomain"]) == (f"bot-train-1-{rank}", SERVICE)
        assert metadata["annotations"]["batch.kubernetes.io/job-completion-index"] == str(rank)
        assert service["spec"]["selector"].items() <= metadata["labels"].items()
        variables = {entry["name"]: entry for entry in spec["containers"][0]["env"]}
        assert variables["PET_MASTER_ADDR"]["value"] == f"{pods[0]['spec']['hostname']}.{SERVICE}"
        path = variables["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_out_of_memory_in_one_pod(api: Api, operator: Operator) -> None:
    """The pod that went over its limit is named, not the one that lost it; the next attempt has pods of its own."""
    create(api)
    for node in (0, 1):
        start(api, node)
    api.until("bot", lambda s: s.get("phase") == "Running")
    end(api, 1, 137, ended_as="OOMKilled", at="2026-01-01T00:01:00Z")
    # By now the Job controller has asked the other pod to go.
    wait(lambda: "deletionTimestamp" in api.pod("bot", node=0)["metadata"], "the end of the other pod")
    assert api.status("bot")["attempt"] == 1
    end(api, 0, 1, PEER_LOST, at="2026-01-01T00:01:02Z")
    status = api.until("bot", lambda s: s.get("attempts"))
    attempt = status["attempts"][0]
    assert (attempt["cause"], attempt["exitCode"]) == ("OutOfMemory", 137)
    assert attempt["message"].startswith("node 1: the container went over its memory limit of 3Gi")
    assert (status["restarts"], status["freeRestarts"]) == (1, 0)
    finish_deletion(api)
    api.until("bot", lambda s: s.get("attempt") == 2)
    assert api.pod("bot", 2, node=1)["spec"]["subdomain"] == "ftj-bot-train-2"


def test_peer_lost_alone(api: Api, operator: Operator) -> None:
    """Where no pod has a better cause, the lost connection is it, and counts."""
    create(api, retry={"maxRestarts": 0})
    for node in (0, 1):
        start(api, node)
    api.until("bot", lambda s: s.get("phase") == "Running")
    for node in (0, 1):
        end(api, node, 1, PEER_LOST, at=f"2026-01-01T00:01:0{node}Z")
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["attempts"][0]["cause"] == "PeerLost"
    assert status["failure"]["reason"] == "BackoffLimitExceeded"


def test_problem_of_the_second_pod(api: Api, operator: Operator) -> None:
    """A pod that fits nowhere is named, although the first one runs."""
    create(api)
    start(api, 0)
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "lastTransitionTime": TIME}
    second = api.pod("bot", node=1)
    api.play_kubelet(second, phase="Pending", conditions=[{**condition, "message": "0/1 nodes are available"}])
    wait(lambda: api.condition("bot", "PodsReady").get("reason") == "Unschedulable", "the condition")
    message = api.condition("bot", "PodsReady")["message"]
    assert message == f"1/2 pods ready; pod {second['metadata']['name']}: 0/1 nodes are available"


def test_suspend_and_resume(api: Api, operator: Operator) -> None:
    """Suspending removes Job, pods and Service; the next attempt has a Service of its own."""
    create(api)
    for node in (0, 1):
        start(api, node)
    api.until("bot", lambda s: s.get("phase") == "Running")
    api.patch("finetunejobs", "bot", {"spec": {"suspend": True}})
    api.until("bot", lambda s: s.get("phase") == "Suspended")
    wait(lambda: not api.items("jobs") and not api.items("services"), "removal of Job and Service")
    finish_deletion(api)
    api.patch("finetunejobs", "bot", {"spec": {"suspend": False}})
    api.until("bot", lambda s: s.get("attempt") == 2)
    assert [one["metadata"]["name"] for one in api.items("services")] == ["ftj-bot-train-2"]
    assert api.status("bot")["restarts"] == 0


def test_deletion(api: Api, operator: Operator) -> None:
    """Deleting the FineTuneJob removes its Job, its pods and its Service."""
    create(api)
    for node in (0, 1):
        start(api, node)
    api.delete("finetunejobs", "bot")
    wait(lambda: not api.items("jobs") and not api.items("services"), "removal of Job and Service")
    finish_deletion(api)


def test_job_deleted_by_hand(api: Api, operator: Operator) -> None:
    """The Service goes after its Job, and the next attempt gets both."""
    create(api)
    api.until("bot", lambda s: s.get("jobRef"))
    api.delete("jobs", "bot-train-1")
    api.until("bot", lambda s: s.get("attempts"))
    wait(lambda: api.get("services", SERVICE) is None, "removal of the Service")
    api.until("bot", lambda s: s.get("attempt") == 2)
    assert [one["metadata"]["name"] for one in api.items("services")] == ["ftj-bot-train-2"]


def test_ttl(api: Api, operator: Operator) -> None:
    """Some time after the end the Service goes with the Job."""
    create(api, ttlAfterFinished="2s")
    for node, report in ((0, REPORT), (1, FOLLOWER)):
        end(api, node, 0, report, ended_as="Completed")
    api.until("bot", lambda s: s.get("phase") == "Complete")
    wait(lambda: not api.items("jobs") and not api.items("services"), "removal of Job and Service")


def test_killed_between_service_and_job(api: Api, operator: Operator, proxy: Proxy) -> None:
    """An operator that has made the Service, and no Job, goes on with it."""
    proxy.refuse = lambda r: 503 if (r.namespace, r.resource, r.verb) == (api.namespace, "jobs", "create") else None
    create(api)
    made = wait(lambda: api.get("services", SERVICE), "the Service")
    wait(
        lambda: any(r.namespace == api.namespace and r.resource == "jobs" for r in proxy.requests), "the Job's request"
    )
    operator.kill()
    proxy.refuse = lambda _: None
    operator.start()
    api.until("bot", lambda s: s.get("jobRef"))
    assert [one["metadata"]["uid"] for one in api.items("services")] == [made["metadata"]["uid"]]


def test_somebody_else_s_service(api: Api, operator: Operator) -> None:
    """A stranger's Service of the name fails the run before it has a Job, and is left alone."""
    api.call("POST", api.path("services"), {"metadata": {"name": SERVICE}, "spec": {"ports": [{"port": 80}]}})
    create(api)
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"]["reason"] == "NameConflict"
    assert f"Service {SERVICE} exists and belongs to somebody else" in status["failure"]["message"]
    assert api.items("jobs") == []
    assert api.get("services", SERVICE) is not None


def test_a_service_that_is_refused(api: Api, operator: Operator) -> None:
    """A quota that allows no Service is shown with the API server's message, and no Job is made meanwhile."""
    path = f"/api/v1/namespaces/{api.namespace}/resourcequotas"
    api.call("POST", path, {"metadata": {"name": "none"}, "spec": {"hard": {"count/services": "0"}}})
    wait(lambda: api.call("GET", f"{path}/none").get("status", {}).get("hard"), "the quota")
    create(api)
    wait(lambda: api.condition("bot", "PodsReady").get("reason") == "Forbidden", "the condition")
    assert f"refused Service {SERVICE}: " in api.condition("bot", "PodsReady")["message"]
    assert api.items("jobs") == []
    api.call("DELETE", f"{path}/none")
    api.until("bot", lambda s: s.get("jobRef"), limit=60)


def test_names_that_begin_with_a_digit(api: Api, operator: Operator) -> None:
    """Of 45 characters, in as many nodes as there can be: the API server takes Service and Job."""
    name = "7" * 45
    create(api, name, resources={"nodes": 64})
    assert api.pod(name, node=63)["spec"]["hostname"] == f"{name}-train-1-63"
    api.delete("finetunejobs", name)
