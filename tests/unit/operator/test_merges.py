"""What is an AdapterMerge's own: its Job, its results, the FineTuneJobs that it waits for, its place beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.api.builders import job_document, merge_document
from tests.unit.operator.builders import (
    NOW,
    REPORT,
    SETTINGS,
    TIME,
    adaptermerge,
    created,
    ended_pod,
    failed,
    finetunejob,
    job,
    later,
)
from tests.unit.operator.test_decide import condition
from tests.unit.operator.test_plan import environment
from tests.unit.operator.test_references import FakeApi
from tunewright_api.conditions import ConditionType
from tunewright_api.merge_run import MergeRun
from tunewright_api.run_report import MergePlan
from tunewright_api.v1alpha1.status import AdapterMergeStatus, FineTuneJobStatus, ResolvedReference
from tunewright_operator.errors import RunTooLarge
from tunewright_operator.kinds import ADAPTERMERGE, FINETUNEJOB, Key
from tunewright_operator.observe import Observer
from tunewright_operator.observed import ObservedReference, ObservedRun
from tunewright_operator.plan import build_job
from tunewright_operator.post import _event
from tunewright_operator.settings import Settings
from tunewright_operator.status import CreateJob, TransitionEvent, decide, resolved
from tunewright_operator.store import Store

GOLDEN = Path(__file__).parent / "golden"
EMPTY = AdapterMergeStatus()
MANIFEST = REPORT["output"]["manifestUri"]
PINNED = {"uri": MANIFEST, "version": "sha256:" + "1" * 64}
MERGED: dict[str, Any] = {
    **REPORT,
    "message": "merged",
    "output": {**REPORT["output"], "ggufUris": ["s3://bucket/merged/0123456789abcdef/01234567/gguf/Q8_0.gguf"]},
    "merge": {
        "baseUri": "hf://organisation/name",
        "baseVersion": "0123456",
        "adapters": [PINNED],
        "dtype": "BFloat16",
        "changedTensors": 2,
        "totalTensors": 3,
        "shards": 1,
    },
    "verification": {"passed": True, "adapterTensors": 4, "changedTensors": 2, "copiedTensors": 1, "prompts": 4},
}
EVERYTHING: dict[str, Any] = {
    "base": {"uri": "pvc://models/llama"},
    "adapters": [{"uri": "s3://models/a", "weight": 0.25}, {"uri": "pvc://results/b"}],
    "combination": {"type": "TIES"},
    "dtype": "BFloat16",
    "export": {"gguf": ["Q8_0"]},
    "verification": {"prompts": ["Hello"]},
    "output": {"uri": "pvc://results/out", "hub": {"repository": "org/bot"}},
    "storage": {"secretName": "mine", "endpoint": "http://10.0.0.1:9000"},
    "hub": {"secretName": "hf-token"},
    "resources": {"cpu": 8, "memory": "2Gi", "ephemeralStorage": "100Gi"},
    "pod": {"image": "registry:5000/trainer:2", "nodeSelector": {"disk": "ssd"}, "labels": {"team": "a"}},
    "retry": {"timeouts": {"stall": "10m"}},
}
BY_NAME: dict[str, Any] = {"adapters": [{"fineTuneJob": "first"}, {"fineTuneJob": "second", "weight": 0.5}]}


def seen(name: str, state: Any = "Complete", detail: str = "") -> ObservedReference:
    """Return what is seen of a FineTuneJob."""
    return ObservedReference(
        FINETUNEJOB, name, state, detail, manifest_uri=f"s3://models/{name}" if state == "Complete" else None
    )


@pytest.mark.parametrize(("name", "changes"), [("smallest", {}), ("everything", EVERYTHING)])
def test_golden(name: str, changes: dict[str, Any]) -> None:
    """The whole Job is as recorded; `UPDATE_GOLDEN=1` records anew, for review."""
    rendered = yaml.safe_dump(build_job(adaptermerge(**changes), 1, 0, SETTINGS), sort_keys=False, width=110)
    path = GOLDEN / f"merge-{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(rendered)
    assert path.read_text() == rendered


def test_the_document_is_a_merge_run() -> None:
    """The trainer reads what the spec says, with defaults filled in, and the platform's storage."""
    settings = SETTINGS.model_copy(update={"storage_endpoint": "http://s3:8333"})
    run = MergeRun.model_validate_json(
        environment(build_job(adaptermerge(**EVERYTHING), 2, 0, settings))["TUNEWRIGHT_RUN"]
    )
    assert (run.kind, run.name, run.namespace, run.attempt) == ("MergeRun", "bot", "team-a", 2)
    assert run.combination is not None
    assert (run.combination.type, run.combination.density) == ("TIES", 0.5)
    assert (run.gguf, run.dtype, run.stall_seconds) == (["Q8_0"], "BFloat16", 600)
    assert (run.storage.endpoint, run.storage.secret_name) == ("http://10.0.0.1:9000", "mine")


def test_a_merge_pod_asks_for_no_gpu_and_little_memory() -> None:
    """Platform defaults of their own, and a container runtime that is told to give no GPU."""
    settings = SETTINGS.model_copy(update={"default_memory": "16Gi", "default_merge_memory": "3Gi"})
    manifest = build_job(adaptermerge(), 1, 0, settings)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "3Gi", "ephemeral-storage": "50Gi"}
    assert environment(manifest)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "completionMode" not in manifest["spec"]


@pytest.mark.parametrize(
    ("changes", "optional"),
    [
        ({}, True),
        ({"base": {"uri": "hf://org/name"}}, True),
        ({"base": {"uri": "s3://models/base"}}, None),
        ({"base": {"uri": "s3://models/base"}, "adapters": [{"uri": "hf://org/name"}]}, True),
    ],
)
def test_the_platform_s_hub_token_where_the_hub_may_be_used(changes: dict[str, Any], optional: bool | None) -> None:
    """A base that is not named may lie on the Hub; the token may be missing."""
    settings = SETTINGS.model_copy(update={"hub_secret_name": "hf"})
    (container,) = build_job(adaptermerge(**changes), 1, 0, settings)["spec"]["template"]["spec"]["containers"]
    found = [e["valueFrom"]["secretKeyRef"].get("optional") for e in container["env"] if e["name"] == "HF_TOKEN"]
    assert found == ([] if optional is None else [optional])


def test_too_many_prompts() -> None:
    """What does not fit into the document is refused with the field that makes it long."""
    merge = adaptermerge(verification={"prompts": ["x" * 4096] * 20})
    with pytest.raises(RunTooLarge, match=r"65536 are allowed: give fewer or shorter verification\.prompts"):
        build_job(merge, 1, 0, SETTINGS)


def test_first_visit() -> None:
    """A merge of addresses starts at once; what is resolved already stands in the plan."""
    merge = adaptermerge(base={"uri": "hf://organisation/name"}, dtype="Float16")
    decision = decide(merge, EMPTY, ObservedRun(), NOW, SETTINGS)
    assert decision.action == CreateJob(1, 0)
    assert isinstance(decision.status, AdapterMergeStatus)
    assert (decision.status.stage, decision.status.phase) == ("Merge", "Pending")
    assert decision.status.plan == MergePlan(base_uri="hf://organisation/name", dtype="Float16")
    again = AdapterMergeStatus.model_validate(decision.status.document())
    assert decide(merge, again, ObservedRun(), later(1), SETTINGS).status == again


def test_it_waits_for_all_that_it_names() -> None:
    """No Job before every adapter is there; each found one is kept, and goes into the document in its place."""
    merge = adaptermerge(**BY_NAME)
    waiting = decide(
        merge, EMPTY, ObservedRun(references=(seen("first"), seen("second", "Unfinished", "Running"))), NOW, SETTINGS
    )
    assert waiting.action is None
    assert condition(waiting.status)[1:] == (
        "WaitingForFineTuneJob",
        "waiting for the result of FineTuneJob second (Running)",
    )
    ready = decide(merge, waiting.status, ObservedRun(references=(seen("second"),)), later(60), SETTINGS)
    assert ready.action == CreateJob(1, 0)
    assert ready.status.references == [
        ResolvedReference(fine_tune_job=name, manifest_uri=f"s3://models/{name}") for name in ("first", "second")
    ]
    document = json.loads(environment(build_job(resolved(merge, ready.status), 1, 0, SETTINGS))["TUNEWRIGHT_RUN"])
    assert document["adapters"] == [{"uri": "s3://models/first"}, {"uri": "s3://models/second", "weight": 0.5}]


def test_one_that_was_deleted_is_waited_for() -> None:
    """What is not there may still come: applying both in one file works in any order."""
    decision = decide(
        adaptermerge(**BY_NAME), EMPTY, ObservedRun(references=(seen("first", "Missing"),)), NOW, SETTINGS
    )
    assert (decision.action, decision.status.phase) == (None, "Pending")
    assert "FineTuneJob first, which does not exist: create it" in condition(decision.status)[2]


def test_a_failed_one_ends_the_merge() -> None:
    """With its reason, before any Job."""
    references = (seen("first", "Unfinished", "Running"), seen("second", "Failed", "InvalidData: row 3"))
    decision = decide(adaptermerge(**BY_NAME), EMPTY, ObservedRun(references=references), NOW, SETTINGS)
    assert (decision.action, decision.status.phase) == (None, "Failed")
    reason, message = condition(decision.status, ConditionType.FAILED)[1:]
    assert (reason, "FineTuneJob second" in message, "InvalidData: row 3" in message) == (
        "DependencyFailed",
        True,
        True,
    )


def test_success() -> None:
    """The report's pinned inputs, proofs and files are in the status; no GPU was used."""
    report = ObservedRun(job=job(kind=ADAPTERMERGE, finished="Complete"), pod=ended_pod(0, report=json.dumps(MERGED)))
    status = decide(adaptermerge(), created(adaptermerge), report, later(61), SETTINGS).status
    assert isinstance(status, AdapterMergeStatus)
    document = status.document()
    assert (document["phase"], document["plan"]) == ("Complete", MERGED["merge"])
    assert document["verification"] == MERGED["verification"]
    assert document["output"]["ggufUris"] == MERGED["output"]["ggufUris"]
    assert document["usage"] == {"gpuSeconds": 0, "lostGpuSeconds": 0}
    assert document["progress"]["percent"] == 100


def test_the_plan_stays_where_the_report_has_none() -> None:
    """A report that was too long for it leaves what was known before."""
    report = json.dumps({**MERGED, "merge": None})
    end = ObservedRun(job=job(kind=ADAPTERMERGE, finished="Complete"), pod=ended_pod(0, report=report))
    status = decide(adaptermerge(), created(adaptermerge), end, later(61), SETTINGS).status
    assert isinstance(status, AdapterMergeStatus)
    assert (status.phase, status.plan) == ("Complete", MergePlan())


@pytest.mark.parametrize("code", [22, 137])
def test_memory_that_runs_out_is_a_matter_of_resources(code: int) -> None:
    """There is no batch to make smaller: the message names the limit alone, and the restart counts."""
    end = failed(code, termination_reason="OOMKilled" if code == 137 else "Error")
    status = decide(adaptermerge(resources={"memory": "3Gi"}), created(adaptermerge), end, NOW, SETTINGS).status
    assert (status.phase, status.restarts) == ("Restarting", 1)
    if code == 137:
        assert "limit of 3Gi and was killed: raise resources.memory" in status.attempts[0].message
    assert "batchSize" not in status.attempts[0].message


def stored(document: dict[str, Any], version: int = 1, **status: Any) -> dict[str, Any]:
    """Return an object as a watch delivers it."""
    document["metadata"] |= {"namespace": "team-a", "uid": document["kind"], "resourceVersion": str(version)}
    return {**document, "status": status}


def child(label: str) -> dict[str, Any]:
    """Return a Job or pod of the workload `bot` of a kind."""
    labels = {f"tunewright.dev/{label}": "bot", "tunewright.dev/attempt": "1"}
    return {
        "metadata": {
            "name": label, "namespace": "team-a", "uid": label, "creationTimestamp": TIME, "labels": labels,
        },
        "status": {},
    }  # fmt: skip


def test_two_of_one_name() -> None:
    """A FineTuneJob and an AdapterMerge called the same have entries, Jobs, pods and phases of their own."""
    store = Store()
    training = store.put_workload(FINETUNEJOB, stored(job_document("bot"), phase="Running"))
    merging = store.put_workload(ADAPTERMERGE, stored(merge_document("bot"), phase="Pending"))
    assert (training, merging) == (Key(FINETUNEJOB, "team-a", "bot"), Key(ADAPTERMERGE, "team-a", "bot"))
    assert training is not None
    assert merging is not None
    assert training != merging
    assert (store.put_job(child("finetunejob")), store.put_job(child("adaptermerge"))) == (training, merging)
    store.put_pod(child("adaptermerge"))
    assert (list(store.entry(training).pods), list(store.entry(merging).pods)) == ([], ["adaptermerge"])
    assert store.phases(ADAPTERMERGE) == {("team-a", "Pending"): 1}
    store.drop_workload(FINETUNEJOB, stored(job_document("bot")))
    assert list(store.keys()) == [merging]


def test_circles_across_kinds() -> None:
    """A merge that waits for a FineTuneJob that waits for the merge."""
    store = Store()
    training, merging = Key(FINETUNEJOB, "team-a", "bot"), Key(ADAPTERMERGE, "team-a", "bot")
    store.wait_for(training, [merging])
    assert store.circle(training) == ()
    store.wait_for(merging, [training])
    assert store.circle(training) == (training, merging, training)


MERGED_MODEL = MERGED["output"]["uri"]
FROM_MERGE: dict[str, Any] = {"model": {"fromMerge": "merged"}}
MERGE_DONE = ObservedReference(ADAPTERMERGE, "merged", "Complete", manifest_uri=MANIFEST, uri=MERGED_MODEL)


def test_a_finetunejob_waits_for_the_merge_whose_model_it_trains() -> None:
    """Without a Job, until the merged model's address takes the place of the name; later attempts keep it."""
    job, empty = finetunejob(**FROM_MERGE), FineTuneJobStatus()
    unfinished = ObservedReference(ADAPTERMERGE, "merged", "Unfinished", "Running")
    waiting = decide(job, empty, ObservedRun(references=(unfinished,)), NOW, SETTINGS)
    assert waiting.action is None
    assert condition(waiting.status)[1:] == (
        "WaitingForAdapterMerge",
        "waiting for the result of AdapterMerge merged (Running)",
    )
    ready = decide(job, waiting.status, ObservedRun(references=(MERGE_DONE,)), later(60), SETTINGS).status
    assert ready.references == [ResolvedReference(adapter_merge="merged", manifest_uri=MANIFEST, uri=MERGED_MODEL)]
    document = json.loads(environment(build_job(resolved(job, ready), 1, 0, SETTINGS))["TUNEWRIGHT_RUN"])
    assert document["model"] == {"uri": MERGED_MODEL, "dtype": "Auto", "attention": "Auto"}
    assert decide(job, ready, ObservedRun(), later(120), SETTINGS).action == CreateJob(1, 0)


def test_a_failed_merge_fails_what_needs_it() -> None:
    """The message says of which kind the failed one is."""
    broken = ObservedReference(ADAPTERMERGE, "merged", "Failed", "VerificationFailed: layer 3")
    job = finetunejob(**FROM_MERGE)
    status = decide(job, FineTuneJobStatus(), ObservedRun(references=(broken,)), NOW, SETTINGS).status
    reason, message = condition(status, ConditionType.FAILED)[1:]
    assert reason == "DependencyFailed"
    assert message.startswith("AdapterMerge merged, whose result this one needs, has failed: VerificationFailed")


async def test_a_merge_that_makes_no_model() -> None:
    """A combination of adapters is told from a merged model before a pod is started."""
    store, api = Store(), FakeApi()
    document = merge_document("merged", output={"uri": "s3://models/out", "adapterOnly": True})
    store.put_workload(ADAPTERMERGE, stored(document, completionTime=TIME, phase="Complete"))
    api.documents["merged"] = stored(document, output=MERGED["output"])
    observer = Observer(api, store, SETTINGS)  # type: ignore[arg-type]
    job = finetunejob(**FROM_MERGE)
    seen = await observer.references(Key(FINETUNEJOB, "team-a", "bot"), job.spec, FineTuneJobStatus())
    await observer.close()
    status = decide(job, FineTuneJobStatus(), ObservedRun(references=seen), NOW, SETTINGS).status
    reason, message = condition(status, ConditionType.FAILED)[1:]
    assert reason == "DependencyFailed"
    assert message.startswith("AdapterMerge merged publishes an adapter (output.adapterOnly)")


async def test_what_is_seen_of_a_merge() -> None:
    """Asked of the API server once it has ended, by its own kind: a FineTuneJob of the name is another matter."""
    store, api = Store(), FakeApi()
    store.put_workload(FINETUNEJOB, stored(job_document("merged"), completionTime=TIME, phase="Complete"))
    key, spec = Key(FINETUNEJOB, "team-a", "bot"), finetunejob(**FROM_MERGE).spec
    observer = Observer(api, store, SETTINGS)  # type: ignore[arg-type]
    (missing,) = await observer.references(key, spec, FineTuneJobStatus())
    assert (missing.state, api.requests) == ("Missing", [])
    store.put_workload(ADAPTERMERGE, stored(merge_document("merged"), completionTime=TIME, phase="Complete"))
    api.documents["merged"] = stored(merge_document("merged"), output=MERGED["output"])
    assert await observer.references(key, spec, FineTuneJobStatus()) == (MERGE_DONE,)
    assert api.requests == ["merged"]
    known = [ResolvedReference(adapter_merge="merged", manifest_uri=MANIFEST, uri=MERGED_MODEL)]
    assert await observer.references(key, spec, FineTuneJobStatus(references=known)) == ()
    await observer.close()


async def test_who_closes_a_circle_across_kinds_says_so() -> None:
    """The way names the kinds, since names alone could be those of either."""
    store, api = Store(), FakeApi()
    observer = Observer(api, store, SETTINGS)  # type: ignore[arg-type]
    merge = adaptermerge("merged", adapters=[{"fineTuneJob": "bot"}])
    await observer.references(Key(ADAPTERMERGE, "team-a", "merged"), merge.spec, EMPTY)
    (found,) = await observer.references(
        Key(FINETUNEJOB, "team-a", "bot"), finetunejob(**FROM_MERGE).spec, FineTuneJobStatus()
    )
    assert found == ObservedReference(
        ADAPTERMERGE, "merged", "Circular", "finetunejob/bot -> adaptermerge/merged -> finetunejob/bot"
    )
    await observer.close()


def test_events_name_the_kind() -> None:
    """`kubectl describe` of one kind does not show the events of the other."""
    event = TransitionEvent("Normal", "JobCreated", "created", "Create")
    involved = _event(Key(ADAPTERMERGE, "team-a", "bot"), "uid-1", event, "x")["involvedObject"]
    assert (involved["kind"], involved["name"], involved["uid"]) == ("AdapterMerge", "bot", "uid-1")


def test_the_defaults_of_merges_are_not_those_of_training() -> None:
    """A merge that asked for a trainer's memory would wait for a large node for nothing."""
    settings = Settings()
    assert settings.default_merge_memory != settings.default_memory
