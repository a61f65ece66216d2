"""AdapterMerges against a real API server, alone and beside FineTuneJobs; the test plays the kubelet."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.integration.conftest import Api, Operator, adaptermerge, finetunejob, wait
from tests.integration.proxy import Proxy
from tests.integration.test_lifecycle import REPORT, finish_deletion, start_pod
from tests.integration.test_references import run_document

MANIFEST = REPORT["output"]["manifestUri"]
MERGED: dict[str, Any] = {
    "version": 1,
    "exitCode": 0,
    "reason": "Succeeded",
    "message": "merged and verified",
    "stage": "Finished",
    "runKey": "fedcba9876543210",
    "output": {
        "uri": "s3://models/x/fedcba9876543210/01234567/merged",
        "manifestUri": "s3://models/x/fedcba9876543210/manifest.json",
        "digest": "sha256:" + "0" * 64,
        "sizeBytes": 1000,
        "ggufUris": ["s3://models/x/fedcba9876543210/01234567/gguf/Q8_0.gguf"],
    },
    "merge": {
        "baseUri": "s3://models/base",
        "baseVersion": "0123",
        "adapters": [{"uri": MANIFEST, "version": "sha256:" + "1" * 64, "weight": 0.5}],
        "dtype": "BFloat16",
        "changedTensors": 210,
        "totalTensors": 272,
        "shards": 1,
    },
    "verification": {
        "passed": True, "adapterTensors": 420, "changedTensors": 210, "copiedTensors": 62, "prompts": 4,
        "maxDivergence": 0.01, "allowedDivergence": 0.05, "effect": 3.5, "notes": ["tied embeddings stay tied"],
    },
}  # fmt: skip


def document_of(api: Api, name: str, attempt: int = 1) -> dict[str, Any]:
    """Return the run document of a merge's attempt."""
    job = wait(lambda: api.get("jobs", f"{name}-merge-{attempt}"), f"Job of {name}, attempt {attempt}")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    text = next(entry["value"] for entry in container["env"] if entry["name"] == "TUNEWRIGHT_RUN")
    document: dict[str, Any] = json.loads(text)
    return document


def waits(api: Api, name: str, text: str) -> None:
    """Wait until an AdapterMerge says what it waits for."""
    wait(lambda: text in api.merges.condition(name, "PodsReady").get("message", ""), f"{name} waiting")
    assert api.merges.condition(name, "PodsReady")["reason"] == "WaitingForFineTuneJob"


def complete(api: Api, name: str, report: dict[str, Any] = REPORT) -> dict[str, Any]:
    """Let the pod of a workload succeed, and return the status."""
    api.end_pod(api.pod(name), 0, json.dumps(report), ended_as="Completed")
    return api.until(name, lambda s: s.get("phase") == "Complete")


def test_successful_merge(api: Api, operator: Operator, proxy: Proxy) -> None:
    """One Job, the report's content in the status, no more requests than a FineTuneJob needs, and it stays so."""
    before, merges = len(proxy.requests), api.merges
    api.create(adaptermerge("bot"))
    start_pod(merges, "bot")
    assert merges.status("bot")["stage"] == "Merge"
    status = complete(merges, "bot", MERGED)
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Accepted": "True", "Suspended": "False", "PodsReady": "False", "Complete": "True", "Failed": "False",
        "Ready": "True", "Stalled": "False",
    }  # fmt: skip
    assert status["plan"] == MERGED["merge"]
    assert status["verification"] == MERGED["verification"]
    assert (status["output"], status["runKey"]) == (MERGED["output"], MERGED["runKey"])
    assert status["usage"] == {"gpuSeconds": 0, "lostGpuSeconds": 0}
    assert status["progress"]["percent"] == 100
    wait(lambda: merges.reasons("bot") == ["JobCreated", "Succeeded"], "events")
    used = [r for r in proxy.requests[before:] if r.namespace == api.namespace]
    assert sum(r.verb == "create" and r.resource == "jobs" for r in used) == 1
    assert len(used) <= 6, used
    api.delete("jobs", "bot-merge-1")
    wait(lambda: api.get("jobs", "bot-merge-1") is None, "removal of the Job")
    time.sleep(1)
    assert merges.status("bot") == status


def test_a_merge_restarts_by_cause(api: Api, operator: Operator) -> None:
    """A counted failure has another attempt under a document of its own, a final one has none."""
    api.create(adaptermerge("bot"))
    api.end_pod(api.merges.pod("bot"), 23)
    assert document_of(api, "bot", 2)["attempt"] == 2
    api.end_pod(api.merges.pod("bot", 2), 20)
    status = api.merges.until("bot", lambda s: s.get("phase") == "Failed")
    assert [a["cause"] for a in status["attempts"]] == ["StorageUnavailable", "InvalidInput"]
    assert status["restarts"] == 1


def test_suspend_resume_and_clean_up(api: Api, operator: Operator) -> None:
    """As with a FineTuneJob: pods go and come back, Jobs of a finished one go when told so."""
    merges = api.merges
    api.create(adaptermerge("bot"))
    start_pod(merges, "bot")
    api.patch("adaptermerges", "bot", {"spec": {"suspend": True}})
    merges.until("bot", lambda s: s.get("phase") == "Suspended")
    wait(lambda: not api.items("jobs"), "removal of the Job")
    finish_deletion(api)
    api.patch("adaptermerges", "bot", {"spec": {"suspend": False}})
    merges.until("bot", lambda s: s.get("attempt") == 2)
    api.end_pod(merges.pod("bot", 2), 0, json.dumps(MERGED), ended_as="Completed")
    status = merges.until("bot", lambda s: s.get("phase") == "Complete")
    assert status["restarts"] == 0
    api.patch("adaptermerges", "bot", {"spec": {"ttlAfterFinished": "1s"}})
    wait(lambda: not api.items("jobs"), "removal of the Jobs")
    assert merges.status("bot")["phase"] == "Complete"


def test_deletion(api: Api, operator: Operator) -> None:
    """Its Job and pod go with it."""
    api.create(adaptermerge("bot"))
    start_pod(api.merges, "bot")
    api.delete("adaptermerges", "bot")
    wait(lambda: not api.items("jobs"), "removal of the Job")
    finish_deletion(api)


def test_the_merge_comes_before_what_it_merges(api: Api, operator: Operator) -> None:
    """Applying both in one file works in any order: the merge waits, and then has the addresses in its document."""
    api.create(adaptermerge("bot", adapters=[{"fineTuneJob": "bot"}, {"fineTuneJob": "tone", "weight": 0.5}]))
    waits(api, "bot", "FineTuneJob bot, which does not exist")
    api.create(finetunejob("bot"))
    api.create(finetunejob("tone"))
    waits(api, "bot", "FineTuneJob bot (Pending)")
    complete(api, "bot")
    waits(api, "bot", "waiting for the result of FineTuneJob tone (Pending)")
    assert api.get("jobs", "bot-merge-1") is None
    complete(api, "tone")
    assert document_of(api, "bot")["adapters"] == [{"uri": MANIFEST}, {"uri": MANIFEST, "weight": 0.5}]
    status = api.merges.until("bot", lambda s: s.get("jobRef"))
    assert status["references"] == [{"fineTuneJob": name, "manifestUri": MANIFEST} for name in ("bot", "tone")]
    complete(api.merges, "bot", MERGED)


def test_a_failed_finetunejob_ends_the_merge(api: Api, operator: Operator) -> None:
    """With its reason, and without a Job; a deleted one is waited for, as it may come again."""
    api.create(finetunejob("first"))
    api.create(adaptermerge("bot", adapters=[{"fineTuneJob": "first"}]))
    waits(api, "bot", "FineTuneJob first (Pending)")
    api.delete("finetunejobs", "first")
    waits(api, "bot", "FineTuneJob first, which does not exist")
    finish_deletion(api)
    wait(lambda: not api.items("jobs"), "removal of the Job")
    api.create(finetunejob("first"))
    api.end_pod(api.pod("first"), 20)
    failure = api.merges.until("bot", lambda s: s.get("phase") == "Failed")["failure"]
    assert failure["reason"] == "DependencyFailed"
    assert "FineTuneJob first" in failure["message"]
    assert "InvalidInput" in failure["message"]
    wait(lambda: api.merges.reasons("bot") == ["DependencyFailed"], "event")
    assert api.get("jobs", "bot-merge-1") is None


def test_training_goes_on_from_a_merged_model(api: Api, operator: Operator, proxy: Proxy) -> None:
    """`model.fromMerge` waits for the merge, which waits for its adapter: three steps from one file, in any order."""
    api.create(finetunejob("second", model={"fromMerge": "first"}))
    wait(lambda: "AdapterMerge first, which" in api.condition("second", "PodsReady").get("message", ""), "second waits")
    assert api.condition("second", "PodsReady")["reason"] == "WaitingForAdapterMerge"
    api.create(adaptermerge("first", adapters=[{"fineTuneJob": "first"}]))
    waits(api, "first", "FineTuneJob first, which does not exist")
    api.create(finetunejob("first"))
    complete(api, "first")
    before = len(proxy.requests)
    complete(api.merges, "first", MERGED)
    document = run_document(api, "second")
    assert document["model"] == {"uri": MERGED["output"]["uri"], "dtype": "Auto", "attention": "Auto"}
    used = [r for r in proxy.requests[before:] if r.namespace == api.namespace]
    assert sum(r.verb == "get" and r.resource == "adaptermerges" for r in used) == 1, used
    references = api.until("second", lambda s: s.get("jobRef"))["references"]
    output = MERGED["output"]
    assert references == [{"adapterMerge": "first", "manifestUri": output["manifestUri"], "uri": output["uri"]}]
    complete(api, "second")


def test_a_failed_merge_fails_what_needs_its_model(api: Api, operator: Operator) -> None:
    """With the reason of the merge, and without a Job."""
    api.create(finetunejob("second", model={"fromMerge": "first"}))
    api.create(adaptermerge("first"))
    api.end_pod(api.merges.pod("first"), 20)
    failure = api.until("second", lambda s: s.get("phase") == "Failed")["failure"]
    assert failure["reason"] == "DependencyFailed"
    assert failure["message"].startswith("AdapterMerge first, whose result")
    assert api.get("jobs", "second-train-1") is None


def test_a_circle_across_kinds_fails(api: Api, operator: Operator) -> None:
    """Whoever closes it says who waits for whom."""
    api.create(finetunejob("bot", model={"fromMerge": "bot"}))
    api.create(adaptermerge("bot", adapters=[{"fineTuneJob": "bot"}]))
    messages = [
        place.until("bot", lambda s: s.get("phase") == "Failed")["failure"]["message"] for place in (api, api.merges)
    ]
    assert any("finetunejob/bot" in message and "adaptermerge/bot" in message for message in messages), messages
    assert api.items("jobs") == []


def test_two_of_one_name(api: Api, operator: Operator) -> None:
    """A FineTuneJob and an AdapterMerge of the same name run side by side, and neither has to do with the other."""
    api.create(finetunejob("bot"))
    api.create(adaptermerge("bot"))
    api.end_pod(api.merges.pod("bot"), 20)
    api.merges.until("bot", lambda s: s.get("phase") == "Failed")
    complete(api, "bot")
    assert api.merges.status("bot")["phase"] == "Failed"
    assert {job["metadata"]["name"] for job in api.items("jobs")} == {"bot-train-1", "bot-merge-1"}
    wait(lambda: api.reasons("bot") == ["JobCreated", "Succeeded"], "events of the FineTuneJob")
    wait(lambda: api.merges.reasons("bot") == ["JobCreated", "InvalidInput"], "events of the AdapterMerge")
    api.delete("adaptermerges", "bot")
    wait(lambda: api.get("jobs", "bot-merge-1") is None, "removal of the merge's Job")
    assert api.get("jobs", "bot-train-1") is not None


def test_a_restart_of_the_operator_forgets_no_merge(api: Api, operator: Operator) -> None:
    """Neither one that waits nor one that runs; no Job is created twice."""
    api.create(finetunejob("first"))
    api.create(adaptermerge("waiting", adapters=[{"fineTuneJob": "first"}]))
    api.create(adaptermerge("running"))
    waits(api, "waiting", "FineTuneJob first (Pending)")
    api.merges.until("running", lambda s: s.get("jobRef"))
    operator.kill()
    api.end_pod(api.pod("first"), 0, json.dumps(REPORT), ended_as="Completed")
    api.end_pod(api.merges.pod("running"), 0, json.dumps(MERGED), ended_as="Completed")
    operator.start()
    api.merges.until("running", lambda s: s.get("phase") == "Complete")
    assert document_of(api, "waiting")["adapters"] == [{"uri": MANIFEST}]
    assert len(api.items("jobs")) == 3


def test_too_many_prompts_fail_the_merge(api: Api, operator: Operator) -> None:
    """What passes the schema but not the document's limit says so, and creates nothing."""
    api.create(adaptermerge("bot", verification={"prompts": ["x" * 4096] * 20}))
    failure = api.merges.until("bot", lambda s: s.get("phase") == "Failed")["failure"]
    assert failure["reason"] == "InvalidSpec"
    assert "verification.prompts" in failure["message"]
    assert api.items("jobs") == []


def test_the_merge_of_a_stranger_s_job(api: Api, operator: Operator) -> None:
    """A Job of the name that belongs to nobody is not taken over."""
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}
    body = {"metadata": {"name": "bot-merge-1"}, "spec": {"suspend": True, "template": template}}
    api.call("POST", api.path("jobs"), body)
    api.create(adaptermerge("bot"))
    failure = api.merges.until("bot", lambda s: s.get("phase") == "Failed")["failure"]
    assert (failure["reason"], "rename the AdapterMerge" in failure["message"]) == ("NameConflict", True)
