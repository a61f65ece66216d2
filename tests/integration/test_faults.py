"""Faults around the operator: crashes, refusals, conflicts, an API server that answers with errors."""

from __future__ import annotations

import time

import pytest

from tests.integration.conftest import Api, Operator, finetunejob, wait
from tests.integration.proxy import Proxy, Request


def test_killed_between_job_and_status(api: Api, operator: Operator, proxy: Proxy) -> None:
    """An operator that is killed after it created the Job and before it wrote the status makes no second Job."""
    proxy.refuse = lambda r: 503 if r.verb == "patch" and r.namespace == api.namespace else None
    api.create(finetunejob("bot"))
    wait(lambda: api.get("jobs", "bot-train-1"), "the Job")
    wait(lambda: any(r.verb == "patch" and r.namespace == api.namespace for r in proxy.requests), "the write")
    operator.kill()
    assert api.status("bot") == {}
    job = api.get("jobs", "bot-train-1")
    assert job is not None
    proxy.refuse = lambda _: None
    operator.start()
    status = api.until("bot", lambda s: s.get("jobRef"))
    assert status["jobRef"] == {"name": "bot-train-1", "uid": job["metadata"]["uid"]}
    assert len(api.items("jobs")) == 1


@pytest.mark.parametrize("status", [500, 429, 403])
def test_api_server_refuses_for_a_while(api: Api, operator: Operator, proxy: Proxy, status: int) -> None:
    """Errors of the API server are retried; a refused Job is shown in a condition meanwhile."""
    refused: list[Request] = []

    def refuse(request: Request) -> int | None:
        if request.namespace == api.namespace and (request.resource, request.verb) == ("jobs", "create"):
            refused.append(request)
            return status if len(refused) < 3 else None
        return None

    proxy.refuse = refuse
    api.create(finetunejob("bot"))
    if status == 403:
        wait(lambda: api.condition("bot", "PodsReady").get("reason") == "Forbidden", "the condition")
        assert "refused by the test" in api.condition("bot", "PodsReady")["message"]
    api.until("bot", lambda s: s.get("jobRef"), limit=90)
    assert len(refused) == 3


def test_quota(api: Api, operator: Operator) -> None:
    """A quota that allows no Job is shown with the API server's message; no Job is lost when it is lifted."""
    path = f"/api/v1/namespaces/{api.namespace}/resourcequotas"
    api.call("POST", path, {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}})
    wait(lambda: api.call("GET", f"{path}/none").get("status", {}).get("hard"), "the quota")
    api.create(finetunejob("bot"))
    wait(lambda: api.condition("bot", "PodsReady").get("reason") == "Forbidden", "the condition")
    assert "exceeded quota: none" in api.condition("bot", "PodsReady")["message"]
    assert api.status("bot")["phase"] == "Pending"
    api.call("DELETE", f"{path}/none")
    api.until("bot", lambda s: s.get("jobRef"), limit=60)


def other_job(name: str) -> dict[str, object]:
    """Return somebody else's Job."""
    container = {"name": "c", "image": "x"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return {"metadata": {"name": name}, "spec": {"suspend": True, "template": template}}


def test_name_conflict(api: Api, operator: Operator) -> None:
    """A stranger's Job of the name fails the run and is left alone."""
    api.call("POST", api.path("jobs"), other_job("bot-train-1"))
    api.create(finetunejob("bot"))
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"]["reason"] == "NameConflict"
    assert "bot-train-1" in status["failure"]["message"]
    job = api.get("jobs", "bot-train-1")
    assert job is not None
    assert "ownerReferences" not in job["metadata"]


def test_created_again_at_once(api: Api, operator: Operator) -> None:
    """A FineTuneJob that is deleted and created anew waits for the old Job to go, and gets one of its own."""
    first = api.create(finetunejob("bot"))
    api.until("bot", lambda s: s.get("jobRef"))
    # A finalizer keeps the old Job for a while, as a busy garbage collector would.
    api.patch("jobs", "bot-train-1", {"metadata": {"finalizers": ["example.org/slow"]}})
    api.delete("finetunejobs", "bot")
    second = api.create(finetunejob("bot"))
    assert first["metadata"]["uid"] != second["metadata"]["uid"]
    wait(lambda: "earlier FineTuneJob" in api.condition("bot", "PodsReady").get("message", ""), "the condition")
    api.patch("jobs", "bot-train-1", {"metadata": {"finalizers": None}})
    api.until("bot", lambda s: s.get("jobRef"), limit=60)
    job = api.get("jobs", "bot-train-1")
    assert job is not None
    assert job["metadata"]["ownerReferences"][0]["uid"] == second["metadata"]["uid"]


def test_status_conflict(api: Api, operator: Operator, proxy: Proxy) -> None:
    """A FineTuneJob that changes in the middle of a pass is decided on again from what is there then."""
    changed: list[bool] = []

    def refuse(request: Request) -> int | None:
        if request.namespace == api.namespace and request.verb == "patch" and not changed:
            changed.append(True)
            api.patch("finetunejobs", "bot", {"spec": {"suspend": True}})
        return None

    proxy.refuse = refuse
    api.create(finetunejob("bot"))
    api.until("bot", lambda s: s.get("phase") == "Suspended")
    wait(lambda: not api.items("jobs"), "removal of the Job")


def test_deleted_while_operator_is_away(api: Api, operator: Operator) -> None:
    """What happens while the operator is down is caught up with at its start."""
    for name in ("gone", "resumed", "new"):
        if name != "new":
            api.create(finetunejob(name))
            api.until(name, lambda s: s.get("jobRef"))
    assert operator.stop() == 0
    api.delete("finetunejobs", "gone")
    api.patch("finetunejobs", "resumed", {"spec": {"suspend": True}})
    api.create(finetunejob("new"))
    operator.start()
    api.until("resumed", lambda s: s.get("phase") == "Suspended")
    api.until("new", lambda s: s.get("jobRef"))


def test_restart_writes_nothing(api: Api, operator: Operator, proxy: Proxy) -> None:
    """A restarted operator writes nothing about runs that have not changed."""
    api.create(finetunejob("waiting"))
    api.pod("waiting")
    api.until("waiting", lambda s: s.get("jobRef"))
    time.sleep(1)
    operator.stop()
    before = len(proxy.requests)
    operator.start()
    wait(lambda: "tunewright_workqueue_depth 0.0" in operator.get("/metrics"), "an empty queue")
    time.sleep(2)
    seen = [r for r in proxy.requests[before:] if r.namespace == api.namespace]
    assert not [r for r in seen if r.verb not in ("get", "list", "watch")], seen


def test_health_and_metrics(api: Api, operator: Operator) -> None:
    """Probes and metrics answer, and what the operator does can be seen in the metrics."""
    api.create(finetunejob("bot"))
    api.until("bot", lambda s: s.get("jobRef"))
    assert operator.get("/healthz") == "ok"
    text = operator.get("/metrics")
    assert f'tunewright_workloads{{kind="FineTuneJob",namespace="{api.namespace}",phase="Pending"}} 1.0' in text
    assert 'tunewright_reconcile_total{result="ok"}' in text


def test_log_lines_are_json(api: Api, operator: Operator) -> None:
    """Each log line is one JSON object, and none carries the value of a Secret or a token."""
    api.create(finetunejob("bot"))
    api.until("bot", lambda s: s.get("jobRef"))
    lines = operator.log()
    assert any(line.get("finetunejob") == f"{api.namespace}/bot" for line in lines)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert not any("eyJ" in str(line) for line in lines)
