"""From creation to the end, against a real API server; the test plays the kubelet."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.integration.conftest import Api, Operator, add_namespace, container, finetunejob, wait
from tests.integration.proxy import Proxy

REPORT: dict[str, Any] = {
    "version": 1,
    "exitCode": 0,
    "reason": "Succeeded",
    "message": "trained",
    "stage": "Finished",
    "step": 12,
    "totalSteps": 12,
    "runKey": "0123456789abcdef",
    "loss": 1.25,
    "plan": {"totalSteps": 12, "trainRows": 48, "dataFormat": "PromptCompletion"},
    "evaluation": {"base": 3.0, "tuned": 2.0, "improvement": 1.0},
    "output": {
        "uri": "s3://models/x/0123456789abcdef/01234567/adapter",
        "manifestUri": "s3://models/x/0123456789abcdef/manifest.json",
        "digest": "sha256:" + "0" * 64,
        "sizeBytes": 1000,
    },
}


def start_pod(api: Api, name: str, attempt: int = 1) -> None:
    """Let a pod run."""
    running = container(running={"startedAt": "2026-01-01T00:00:00Z"})
    api.play_kubelet(api.pod(name, attempt), phase="Running", containerStatuses=[running])
    api.until(name, lambda s: s.get("phase") == "Running")


def test_successful_run(api: Api, operator: Operator, proxy: Proxy) -> None:
    """A run goes to Complete with the report's content in its status, within the request budget, and stays so."""
    before = len(proxy.requests)
    api.create(finetunejob("bot"))
    start_pod(api, "bot")
    assert api.condition("bot", "PodsReady")["status"] == "True"
    api.end_pod(api.pod("bot"), 0, json.dumps(REPORT), ended_as="Completed")
    status = api.until("bot", lambda s: s.get("phase") == "Complete")
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Accepted": "True", "Suspended": "False", "PodsReady": "False", "Complete": "True", "Failed": "False",
        "Ready": "True", "Stalled": "False",
    }  # fmt: skip
    assert status["output"]["uri"] == REPORT["output"]["uri"]
    assert status["runKey"] == REPORT["runKey"]
    assert status["evaluation"] == REPORT["evaluation"]
    assert status["plan"]["trainRows"] == 48
    assert status["progress"]["percent"] == 100
    assert status["progress"]["stage"] == "Finished"
    assert status["attempts"][0]["cause"] == "Succeeded"
    wait(lambda: api.reasons("bot") == ["JobCreated", "Succeeded"], "events")
    used = [r for r in proxy.requests[before:] if r.namespace == api.namespace]
    assert sum(r.verb == "create" and r.resource == "jobs" for r in used) == 1
    assert sum(r.verb == "patch" for r in used) <= 6
    assert len(used) <= 6, used
    api.delete("jobs", "bot-train-1")
    wait(lambda: api.get("jobs", "bot-train-1") is None, "removal of the Job")
    time.sleep(1)
    assert api.status("bot") == status


def test_cached_run(api: Api, operator: Operator) -> None:
    """A pod that found a published result leads to Complete with reason Cached."""
    api.create(finetunejob("bot"))
    api.end_pod(api.pod("bot"), 0, json.dumps({**REPORT, "cached": True}), ended_as="Completed")
    api.until("bot", lambda s: s.get("phase") == "Complete")
    assert api.condition("bot", "Complete")["reason"] == "Cached"


@pytest.mark.parametrize("message", ["", "not JSON", json.dumps({**REPORT, "unknown": 1}), json.dumps({"exitCode": 0})])
def test_success_without_report(api: Api, operator: Operator, message: str) -> None:
    """Exit code 0 without a valid report of a result is a failure that counts."""
    api.create(finetunejob("bot", retry={"maxRestarts": 0}))
    api.end_pod(api.pod("bot"), 0, message, ended_as="Completed")
    status = api.until("bot", lambda s: s.get("phase") == "Failed")
    assert status["failure"]["reason"] == "BackoffLimitExceeded"
    assert status["attempts"][0]["cause"] == "OutputMissing"
    assert "no valid report" in status["failure"]["message"]


def test_suspend_and_resume(api: Api, operator: Operator) -> None:
    """Suspending removes the Job and its pod; resuming starts the next attempt, which counts as no restart."""
    api.create(finetunejob("bot"))
    start_pod(api, "bot")
    api.patch("finetunejobs", "bot", {"spec": {"suspend": True}})
    api.until("bot", lambda s: s.get("phase") == "Suspended")
    assert api.condition("bot", "Suspended")["status"] == "True"
    wait(lambda: not api.items("jobs"), "removal of the Job")
    finish_deletion(api)
    api.patch("finetunejobs", "bot", {"spec": {"suspend": False}})
    status = api.until("bot", lambda s: s.get("attempt") == 2)
    assert status["restarts"] == 0
    assert api.condition("bot", "Suspended") | {"lastTransitionTime": ""} == {
        "type": "Suspended", "status": "False", "reason": "Resumed", "message": "", "observedGeneration": 3,
        "lastTransitionTime": "",
    }  # fmt: skip
    assert [a["cause"] for a in status["attempts"]] == ["UserSuspended"]


def finish_deletion(api: Api) -> None:
    """Remove pods that wait for a kubelet to say that their containers are gone; the next attempt may be there then."""
    names = {pod["metadata"]["name"] for pod in api.items("pods")}
    for name in names:
        api.end_deletion(name)
    wait(lambda: names.isdisjoint(pod["metadata"]["name"] for pod in api.items("pods")), "removal of the pods")


def test_created_suspended(api: Api, operator: Operator) -> None:
    """A FineTuneJob that is created suspended makes no Job until it is resumed, and then attempt 1."""
    api.create(finetunejob("bot", suspend=True))
    api.until("bot", lambda s: s.get("phase") == "Suspended")
    assert api.items("jobs") == []
    api.patch("finetunejobs", "bot", {"spec": {"suspend": False}})
    assert api.until("bot", lambda s: s.get("jobRef"))["attempt"] == 1


def test_ttl_removes_jobs_only(api: Api, operator: Operator) -> None:
    """Some time after the end the Jobs and pods go; the FineTuneJob stays and is not run again."""
    api.create(finetunejob("bot", ttlAfterFinished="2s"))
    api.end_pod(api.pod("bot"), 0, json.dumps(REPORT), ended_as="Completed")
    api.until("bot", lambda s: s.get("phase") == "Complete")
    wait(lambda: not api.items("jobs"), "removal of the Jobs")
    wait(lambda: not api.items("pods"), "removal of the pods")
    time.sleep(2)
    assert api.status("bot")["phase"] == "Complete"
    assert api.items("jobs") == []


def test_ttl_set_after_the_end(api: Api, operator: Operator) -> None:
    """`ttlAfterFinished` is mutable, also when the run is over."""
    api.create(finetunejob("bot"))
    api.end_pod(api.pod("bot"), 0, json.dumps(REPORT), ended_as="Completed")
    api.until("bot", lambda s: s.get("phase") == "Complete")
    api.patch("finetunejobs", "bot", {"spec": {"ttlAfterFinished": "1s"}})
    wait(lambda: not api.items("jobs"), "removal of the Jobs")


def test_deletion(api: Api, operator: Operator) -> None:
    """Deleting a FineTuneJob removes its Job and pod, and the operator leaves it at that."""
    api.create(finetunejob("bot"))
    start_pod(api, "bot")
    api.delete("finetunejobs", "bot")
    wait(lambda: not api.items("jobs"), "removal of the Job")
    finish_deletion(api)
    time.sleep(1)
    assert api.items("jobs") == []
    assert api.items("finetunejobs") == []


def test_longest_names(api: Api, operator: Operator) -> None:
    """A name of 45 characters in a namespace of 63 works."""
    long = add_namespace(api.client, f"{api.namespace}-".ljust(63, "n"))
    name = "f" * 45
    long.create(finetunejob(name))
    assert long.pod(name)["metadata"]["name"].startswith(f"{name}-train-1-")


def test_two_at_once(api: Api, operator: Operator) -> None:
    """Two FineTuneJobs with the same output get a Job each, and end independently."""
    for name in ("one", "two"):
        api.create(finetunejob(name, output={"uri": "s3://models/shared"}))
    api.end_pod(api.pod("one"), 0, json.dumps(REPORT), ended_as="Completed")
    api.until("one", lambda s: s.get("phase") == "Complete")
    assert api.status("two")["phase"] == "Pending"


def test_finished_is_final(api: Api, operator: Operator) -> None:
    """Suspending or resuming a run that is over changes nothing but the generation that was looked at."""
    api.create(finetunejob("bot"))
    api.end_pod(api.pod("bot"), 0, json.dumps(REPORT), ended_as="Completed")
    status = api.until("bot", lambda s: s.get("phase") == "Complete")
    api.patch("finetunejobs", "bot", {"spec": {"suspend": True}})
    time.sleep(1)
    assert api.status("bot") == status
    assert len(api.items("jobs")) == 1
