"""Waiting for the results of other FineTuneJobs: decisions, bookkeeping, and what is asked of the API server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api.builders import job_document
from tests.unit.operator.builders import NOW, REPORT, SETTINGS, TIME, created, failed, job, later
from tests.unit.operator.builders import finetunejob as plain_finetunejob
from tests.unit.operator.test_decide import condition
from tests.unit.operator.test_plan import environment
from tunewright_api.conditions import ConditionType
from tunewright_api.v1alpha1.finetunejob import FineTuneJob
from tunewright_api.v1alpha1.status import FineTuneJobStatus, ResolvedReference
from tunewright_operator import kube
from tunewright_operator.errors import NotFound
from tunewright_operator.kinds import FINETUNEJOB, Key
from tunewright_operator.observe import Observer
from tunewright_operator.observed import ObservedReference, ObservedRun
from tunewright_operator.plan import build_job
from tunewright_operator.settings import Settings
from tunewright_operator.status import CreateJob, decide, resolved
from tunewright_operator.store import Store

EMPTY = FineTuneJobStatus()
MANIFEST = REPORT["output"]["manifestUri"]
DONE = ObservedReference(FINETUNEJOB, "first", "Complete", manifest_uri=MANIFEST, uri=REPORT["output"]["uri"])


def finetunejob(name: str = "bot", other: str = "first", **changes: Any) -> FineTuneJob:
    """Return a FineTuneJob that needs the result of another one."""
    model = {"uri": "hf://organisation/name", "continueFrom": {"fineTuneJob": other}}
    return plain_finetunejob(name, model=model, **changes)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (ObservedReference(FINETUNEJOB, "first", "Unfinished", "Running"), "FineTuneJob first (Running)"),
        (ObservedReference(FINETUNEJOB, "first", "Unfinished", "Suspended"), "FineTuneJob first (Suspended)"),
        (ObservedReference(FINETUNEJOB, "first", "Missing"), "FineTuneJob first, which does not exist: create it"),
    ],
)
def test_no_job_before_the_result_is_there(other: ObservedReference, text: str) -> None:
    """It waits without a Job, says for what, and asks for no further look: events bring it back."""
    decision = decide(finetunejob(), EMPTY, ObservedRun(references=(other,)), NOW, SETTINGS)
    assert (decision.action, decision.requeue_seconds, decision.status.phase) == (None, None, "Pending")
    status, reason, message = condition(decision.status)
    assert (status, reason) == ("False", "WaitingForFineTuneJob")
    assert text in message
    again = decide(finetunejob(), decision.status, ObservedRun(references=(other,)), later(600), SETTINGS)
    assert again.status == decision.status


def test_the_result_goes_into_the_run() -> None:
    """With the result there the Job is created, and its document has the manifest in place of the name."""
    decision = decide(finetunejob(), EMPTY, ObservedRun(references=(DONE,)), NOW, SETTINGS)
    assert decision.action == CreateJob(1, 0)
    assert decision.status.references == [ResolvedReference(fine_tune_job="first", manifest_uri=MANIFEST)]
    assert isinstance(decision.status, FineTuneJobStatus)
    assert decision.status.plan is not None
    assert (decision.status.plan.continued_from, decision.status.plan.lora) == (MANIFEST, None)
    manifest = build_job(resolved(finetunejob(), decision.status), 1, 0, SETTINGS)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert f'"continueFrom":{{"uri":"{MANIFEST}"}}' in container["env"][0]["value"]


def test_later_attempts_use_the_same_result() -> None:
    """What the name stood for at first is remembered, also when the other FineTuneJob is gone."""
    first = decide(finetunejob(), EMPTY, ObservedRun(references=(DONE,)), NOW, SETTINGS).status
    status = created().model_copy(update={"references": first.references})
    restarted = decide(finetunejob(), status, failed(1), NOW, SETTINGS).status
    again = decide(finetunejob(), restarted, ObservedRun(), later(60), SETTINGS)
    assert again.action == CreateJob(2, 0)
    manifest = build_job(resolved(finetunejob(), again.status), 2, 0, SETTINGS)
    assert f'"continueFrom":{{"uri":"{MANIFEST}"}}' in environment(manifest)["TUNEWRIGHT_RUN"]
    assert again.status.references == first.references


def test_a_result_that_is_found_after_the_job_is_recorded() -> None:
    """An operator that died between creating the Job and writing the status finds out again."""
    status = decide(finetunejob(), EMPTY, ObservedRun(job=job(), references=(DONE,)), NOW, SETTINGS).status
    assert status.references is not None
    lost = ObservedRun(job=job(), references=(ObservedReference(FINETUNEJOB, "first", "Missing"),))
    assert condition(decide(finetunejob(), EMPTY, lost, NOW, SETTINGS).status)[1] == "WaitingForPods"


@pytest.mark.parametrize(
    ("other", "texts"),
    [
        (
            ObservedReference(FINETUNEJOB, "first", "Failed", "InvalidData: row 3"),
            ["FineTuneJob first,", "InvalidData: row 3"],
        ),
        (ObservedReference(FINETUNEJOB, "b", "Circular", "a -> b -> a"), ["wait for one another", "a -> b -> a"]),
    ],
)
def test_what_can_never_come_fails_the_run(other: ObservedReference, texts: list[str]) -> None:
    """A failed or circular dependency is final, before any Job is created."""
    decision = decide(finetunejob(), EMPTY, ObservedRun(references=(other,)), NOW, SETTINGS)
    assert (decision.action, decision.status.phase) == (None, "Failed")
    assert condition(decision.status, ConditionType.FAILED)[1] == "DependencyFailed"
    assert decision.status.failure is not None
    for text in texts:
        assert text in decision.status.failure.message


def test_suspend_while_waiting() -> None:
    """A waiting run can be suspended, and waits again afterwards; it has had no attempt."""
    seen = ObservedRun(references=(ObservedReference(FINETUNEJOB, "first", "Unfinished", "Running"),))
    waiting = decide(finetunejob(), EMPTY, seen, NOW, SETTINGS).status
    suspended = decide(finetunejob(suspend=True), waiting, seen, NOW, SETTINGS).status
    assert (suspended.phase, suspended.attempts) == ("Suspended", [])
    assert condition(decide(finetunejob(), suspended, seen, NOW, SETTINGS).status)[1] == "WaitingForFineTuneJob"


def test_claims_and_credentials_of_a_result() -> None:
    """A result on a volume is mounted read-only; one in S3 brings the platform's Secret."""

    def pod_of(uri: str, settings: Settings = SETTINGS) -> dict[str, Any]:
        spec = plain_finetunejob(
            model={"uri": "hf://a/b", "continueFrom": {"uri": uri}},
            dataset={"train": [{"uri": "pvc://data/t.jsonl"}]},
            output={"uri": "pvc://data/out"},
        )
        rendered: dict[str, Any] = build_job(spec, 1, 0, settings)["spec"]["template"]["spec"]
        return rendered

    pod = pod_of("pvc://results/a/0123456789abcdef")
    mounts = {m["mountPath"]: m["readOnly"] for m in pod["containers"][0]["volumeMounts"] if "readOnly" in m}
    assert mounts == {"/mnt/pvc/data": False, "/mnt/pvc/results": True}
    (container,) = pod_of("s3://results/a", SETTINGS.model_copy(update={"storage_secret_name": "s3"}))["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]


class FakeApi:
    """Answers reads of workloads with what it was given, and counts them."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []

    async def get(self, resource: kube.Resource, namespace: str, name: str) -> dict[str, Any]:
        """Return a document."""
        assert namespace == "team-a"
        self.requests.append(name)
        if name not in self.documents or resource[1] != f"{self.documents[name]['kind'].lower()}s":
            raise NotFound(404, "NotFound", name)
        return self.documents[name]


def stored(name: str, version: int = 1, **status: Any) -> dict[str, Any]:
    """Return a FineTuneJob as a watch delivers it."""
    document = job_document(name)
    document["metadata"] |= {"namespace": "team-a", "uid": name, "resourceVersion": str(version)}
    return {**document, "status": status}


def key(name: str) -> Key:
    """Return the key of a FineTuneJob in the test's namespace."""
    return Key(FINETUNEJOB, "team-a", name)


@pytest.fixture
def api() -> FakeApi:
    """The API server."""
    return FakeApi()


async def look(store: Store, api: FakeApi, name: str, other: str) -> ObservedReference:
    """Return what a FineTuneJob sees of the one that it needs."""
    observer = Observer(api, store, SETTINGS)  # type: ignore[arg-type]
    try:
        (found,) = await observer.references(key(name), finetunejob(name, other).spec, EMPTY)
    finally:
        await observer.close()
    return found


async def test_waiting_costs_no_request(api: FakeApi) -> None:
    """What the watches have delivered is enough until the other one has ended."""
    store = Store()
    assert await look(store, api, "bot", "first") == ObservedReference(FINETUNEJOB, "first", "Missing")
    store.put_workload(FINETUNEJOB, stored("first"))
    assert await look(store, api, "bot", "first") == ObservedReference(FINETUNEJOB, "first", "Unfinished", "Pending")
    store.put_workload(FINETUNEJOB, stored("first", 2, phase="Running"))
    assert await look(store, api, "bot", "first") == ObservedReference(FINETUNEJOB, "first", "Unfinished", "Running")
    assert api.requests == []
    assert store.awaited_by(key("first")) == (key("bot"),)


async def test_an_ended_one_is_read_once(api: FakeApi) -> None:
    """Result or failure come from one live read, after which nobody waits."""
    store = Store()
    store.put_workload(FINETUNEJOB, stored("first", completionTime=TIME, phase="Complete"))
    api.documents["first"] = stored("first", output=REPORT["output"])
    assert await look(store, api, "bot", "first") == DONE
    api.documents["first"] = stored("first", failure={"reason": "InvalidData", "message": "row 3"})
    assert await look(store, api, "bot", "first") == ObservedReference(
        FINETUNEJOB, "first", "Failed", "InvalidData: row 3"
    )
    assert store.awaited_by(key("first")) == ()
    del api.documents["first"]
    assert await look(store, api, "bot", "first") == ObservedReference(FINETUNEJOB, "first", "Missing")
    assert api.requests == ["first"] * 3
    assert store.awaited_by(key("first")) == (key("bot"),)


async def test_what_is_known_is_not_looked_at(api: FakeApi) -> None:
    """A result in the status stays what it is, and a FineTuneJob without references costs nothing."""
    observer = Observer(api, Store(), SETTINGS)  # type: ignore[arg-type]
    known = EMPTY.model_copy(update={"references": [ResolvedReference(fine_tune_job="first", manifest_uri=MANIFEST)]})
    assert await observer.references(key("bot"), finetunejob().spec, known) == ()
    assert await observer.references(key("bot"), plain_finetunejob().spec, EMPTY) == ()
    assert api.requests == []
    await observer.close()


async def test_circles_are_found_by_whoever_closes_them(api: FakeApi) -> None:
    """Three that wait for one another, and one that waits for itself; a chain is no circle."""
    store = Store()
    for name in "abc":
        store.put_workload(FINETUNEJOB, stored(name))
    assert (await look(store, api, "a", "b")).state == "Unfinished"
    assert (await look(store, api, "b", "c")).state == "Unfinished"
    assert await look(store, api, "c", "a") == ObservedReference(
        FINETUNEJOB, "a", "Circular", "finetunejob/c -> finetunejob/a -> finetunejob/b -> finetunejob/c"
    )
    assert await look(store, api, "a", "a") == ObservedReference(
        FINETUNEJOB, "a", "Circular", "finetunejob/a -> finetunejob/a"
    )


def test_those_who_have_ended_or_gone_wait_for_nobody() -> None:
    """Bookkeeping ends with the FineTuneJob, whichever way that goes."""
    store = Store()
    for name in ("a", "b"):
        store.put_workload(FINETUNEJOB, stored(name))
        store.wait_for(key(name), [key("first"), key("second")])
    assert store.awaited_by(key("first")) == (key("a"), key("b"))
    store.put_workload(FINETUNEJOB, stored("a", 2, completionTime=TIME, phase="Failed"))
    assert store.awaited_by(key("first")) == (key("b"),)
    store.drop_workload(FINETUNEJOB, stored("b"))
    assert store.awaited_by(key("second")) == ()
    assert store.circle(key("a")) == ()
