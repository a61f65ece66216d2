"""What is kept of watched objects, and what counts as news."""

from __future__ import annotations

from typing import Any

from tests.unit.api.builders import job_document
from tests.unit.operator.builders import TIME
from tunewright_operator.kinds import FINETUNEJOB, Key
from tunewright_operator.store import Store

KEY = Key(FINETUNEJOB, "team-a", "bot")


def finetunejob(version: int, **status: Any) -> dict[str, Any]:
    """Return a FineTuneJob as a watch delivers it."""
    document = job_document("bot")
    document["metadata"] |= {
        "namespace": "team-a", "uid": "uid-1", "resourceVersion": str(version), "managedFields": [{"big": "x" * 1000}],
    }  # fmt: skip
    return {**document, "status": status}


def child(name: str, **status: Any) -> dict[str, Any]:
    """Return a Job or pod of it."""
    labels = {"tunewright.dev/finetunejob": "bot", "tunewright.dev/attempt": "1"}
    metadata = {"name": name, "namespace": "team-a", "uid": name, "creationTimestamp": TIME, "labels": labels}
    return {"metadata": metadata, "status": status}


def test_only_newer_versions_are_news() -> None:
    """Lists and watches overlap; what is known already leads to no pass."""
    store = Store()
    assert store.put_workload(FINETUNEJOB, finetunejob(5)) == KEY
    assert store.put_workload(FINETUNEJOB, finetunejob(5)) is None
    assert store.put_workload(FINETUNEJOB, finetunejob(4)) is None
    assert store.put_workload(FINETUNEJOB, finetunejob(6)) == KEY


def test_the_echo_of_an_own_write_is_no_news() -> None:
    """The watch shows a write of ours again; until then it is awaited, which health looks at."""
    store = Store()
    store.put_workload(FINETUNEJOB, finetunejob(7), written=True)
    assert store.entry(KEY).awaited is not None
    assert store.put_workload(FINETUNEJOB, finetunejob(7)) is None
    assert store.entry(KEY).awaited is None
    assert store.longest_awaited() == 0


def test_little_is_kept() -> None:
    """Field managers are left out; of a finished run only version and phase stay."""
    store = Store()
    store.put_workload(FINETUNEJOB, finetunejob(1))
    text = store.entry(KEY).text
    assert text is not None
    assert len(text) < 700
    store.put_pod(child("p"))
    store.put_workload(FINETUNEJOB, finetunejob(2, completionTime=TIME, phase="Complete"))
    entry = store.entry(KEY)
    assert (entry.text, entry.pods, entry.finished, entry.phase) == (None, {}, True, "Complete")
    assert store.put_pod(child("p2")) is None


def test_children_are_news_when_something_that_matters_changes() -> None:
    """A Job's counters do not matter, its end does; so does its removal, once."""
    store = Store()
    assert store.put_job(child("j")) == KEY
    assert store.put_job(child("j", active=1)) is None
    done = {"conditions": [{"type": "Complete", "status": "True"}]}
    assert store.put_job(child("j", **done)) == KEY
    assert store.put_job(child("j", **done), gone=True) == KEY
    assert store.put_job(child("j", **done), gone=True) is None


def test_children_of_nobody() -> None:
    """What has no label of ours is none of ours, and the end of unknown children makes no entry."""
    store = Store()
    bare = child("j")
    del bare["metadata"]["labels"]
    assert store.put_job(bare) is None
    assert store.put_pod(child("p"), gone=True) is None
    assert list(store.keys()) == []


def test_last_words_outlive_the_pod() -> None:
    """A pod that is gone is kept until the end of its attempt is on record."""
    store = Store()
    store.put_pod(child("p", phase="Running"))
    store.put_pod(child("p", phase="Failed"), gone=True)
    assert store.entry(KEY).pods["p"].gone
    store.drop_pods_before(KEY, 2)
    assert store.entry(KEY).pods == {}


def test_phases_are_counted_by_namespace() -> None:
    """The gauge of FineTuneJobs has no names in it."""
    store = Store()
    store.put_workload(FINETUNEJOB, finetunejob(1, phase="Running"))
    assert store.phases(FINETUNEJOB) == {("team-a", "Running"): 1}
