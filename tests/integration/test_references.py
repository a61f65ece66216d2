"""FineTuneJobs that need the results of others, against a real API server; the test plays the kubelet."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.integration.conftest import Api, Operator, finetunejob, wait
from tests.integration.proxy import Proxy
from tests.integration.test_lifecycle import REPORT, start_pod

MANIFEST = REPORT["output"]["manifestUri"]


def continued(name: str, other: str, **changes: Any) -> dict[str, Any]:
    """Return a FineTuneJob that goes on from another one's adapter."""
    model = {"uri": "s3://models/base", "continueFrom": {"fineTuneJob": other}}
    return finetunejob(name, model=model, **changes)


def waits(api: Api, name: str, text: str) -> None:
    """Wait until a FineTuneJob says that it waits, and for what."""
    wait(lambda: text in api.condition(name, "PodsReady").get("message", ""), f"{name} waits: {text}")
    assert api.condition(name, "PodsReady")["reason"] == "WaitingForFineTuneJob"
    assert api.items("jobs", f"tunewright.dev/finetunejob={name}") == []


def run_document(api: Api, name: str, attempt: int = 1) -> Any:
    """Return the run document in the Job of an attempt."""
    job = wait(lambda: api.get("jobs", f"{name}-train-{attempt}"), f"Job of {name}")
    variables = {e["name"]: e.get("value") for e in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    return json.loads(variables["TUNEWRIGHT_RUN"])


def complete(api: Api, name: str) -> None:
    """End the pod of a FineTuneJob with a result."""
    api.end_pod(api.pod(name), 0, json.dumps(REPORT), ended_as="Completed")
    api.until(name, lambda s: s.get("phase") == "Complete")


def test_it_waits_and_then_takes_the_result(api: Api, operator: Operator, proxy: Proxy) -> None:
    """No Job until the other one is complete, its manifest in the document then, and few requests for all of it."""
    api.create(continued("second", "first"))
    waits(api, "second", "FineTuneJob first, which does not exist")
    api.create(finetunejob("first"))
    start_pod(api, "first")
    waits(api, "second", "FineTuneJob first (Running)")
    before = len(proxy.requests)
    complete(api, "first")
    assert run_document(api, "second")["model"]["continueFrom"] == {"uri": MANIFEST}
    status = api.until("second", lambda s: s.get("jobRef"))
    assert status["references"] == [{"fineTuneJob": "first", "manifestUri": MANIFEST}]
    assert status["plan"]["continuedFrom"] == MANIFEST
    assert "lora" not in status["plan"]
    used = [r for r in proxy.requests[before:] if r.namespace == api.namespace]
    assert sum(r.verb == "get" and r.resource == "finetunejobs" for r in used) == 1, used
    complete(api, "second")


def test_waiting_makes_no_requests(api: Api, operator: Operator, proxy: Proxy) -> None:
    """One that waits costs nothing but the writes of its status."""
    api.create(continued("second", "first"))
    waits(api, "second", "which does not exist")
    before = len(proxy.requests)
    time.sleep(5)
    assert [r for r in proxy.requests[before:] if r.namespace == api.namespace] == []


def test_the_other_one_is_complete_already(api: Api, operator: Operator) -> None:
    """Nothing to wait for, and the next attempt does not need the other one any more."""
    api.create(finetunejob("first"))
    complete(api, "first")
    api.create(continued("second", "first"))
    assert run_document(api, "second")["model"]["continueFrom"] == {"uri": MANIFEST}
    api.delete("finetunejobs", "first")
    wait(lambda: api.get("finetunejobs", "first") is None, "removal")
    api.end_pod(api.pod("second"), 23)
    assert run_document(api, "second", 2)["model"]["continueFrom"] == {"uri": MANIFEST}


def test_a_failed_one_fails_those_that_need_it(api: Api, operator: Operator) -> None:
    """One after the other, each with the reason of the one before it; no Job was created for them."""
    api.create(continued("third", "second"))
    api.create(continued("second", "first"))
    api.create(finetunejob("first"))
    api.end_pod(api.pod("first"), 20)
    for name in ("second", "third"):
        failure = api.until(name, lambda s: s.get("phase") == "Failed")["failure"]
        assert failure["reason"] == "DependencyFailed"
        assert "InvalidInput" in failure["message"]
        wait(lambda name=name: api.reasons(name) == ["DependencyFailed"], "event")  # type: ignore[misc]
    assert len(api.items("jobs")) == 1
    api.create(continued("late", "first"))
    api.until("late", lambda s: s.get("phase") == "Failed")


def test_those_that_wait_for_one_another_fail(api: Api, operator: Operator) -> None:
    """A circle is named by whoever closes it, and ends all in it."""
    api.create(continued("a", "b"))
    waits(api, "a", "which does not exist")
    api.create(continued("b", "a"))
    messages = [api.until(name, lambda s: s.get("phase") == "Failed")["failure"]["message"] for name in "ab"]
    assert any("these wait for one another" in m and " -> " in m for m in messages)
    api.create(continued("alone", "alone"))
    failure = api.until("alone", lambda s: s.get("phase") == "Failed")["failure"]
    assert (failure["reason"], "finetunejob/alone -> finetunejob/alone" in failure["message"]) == (
        "DependencyFailed",
        True,
    )
    assert api.items("jobs") == []


def test_a_restart_of_the_operator_forgets_nobody(api: Api, operator: Operator) -> None:
    """Who waits for whom is found out again from what is stored."""
    api.create(finetunejob("first"))
    start_pod(api, "first")
    api.create(continued("second", "first"))
    waits(api, "second", "(Running)")
    operator.kill()
    api.end_pod(api.pod("first"), 0, json.dumps(REPORT), ended_as="Completed")
    operator.start()
    assert run_document(api, "second")["model"]["continueFrom"] == {"uri": MANIFEST}


def test_suspended_while_waiting(api: Api, operator: Operator) -> None:
    """A waiting one can be suspended; the result does not start it, resuming does."""
    api.create(continued("second", "first"))
    waits(api, "second", "which does not exist")
    api.patch("finetunejobs", "second", {"spec": {"suspend": True}})
    api.until("second", lambda s: s.get("phase") == "Suspended")
    api.create(finetunejob("first"))
    complete(api, "first")
    time.sleep(1)
    assert api.get("jobs", "second-train-1") is None
    api.patch("finetunejobs", "second", {"spec": {"suspend": False}})
    assert run_document(api, "second")["model"]["continueFrom"] == {"uri": MANIFEST}
