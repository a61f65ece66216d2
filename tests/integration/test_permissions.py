"""The operator uses exactly the permissions that the chart grants; this file runs last, over all that was recorded."""

from __future__ import annotations

import pytest

from tests.integration.conftest import Api, Operator, adaptermerge, finetunejob, wait
from tests.integration.proxy import Proxy
from tests.operator_permissions import EXPECTED


@pytest.fixture
def used(api: Api, operator: Operator, proxy: Proxy) -> set[tuple[str, str, str]]:
    """Let the operator do everything it can, and return what it asked for."""
    api.create(finetunejob("bot"))
    pod = api.pod("bot")
    api.end_pod(pod, 1)
    api.until("bot", lambda s: s.get("attempt") == 2)
    api.until("bot", lambda s: s.get("jobRef"))
    # Looked for live once it has vanished; and a conflict makes it read the FineTuneJob live.
    api.delete("jobs", "bot-train-2")
    api.until("bot", lambda s: any(a["cause"] == "JobDeleted" for a in s["attempts"]))
    api.patch("finetunejobs", "bot", {"spec": {"suspend": True}})
    api.until("bot", lambda s: s.get("phase") == "Suspended")
    api.create(finetunejob("stopped"))
    api.until("stopped", lambda s: s.get("jobRef"))
    api.patch("finetunejobs", "stopped", {"spec": {"suspend": True}})
    wait(lambda: api.get("jobs", "stopped-train-1") is None, "removal of the Job")
    # Several pods have a Service; one that is there already is looked at.
    several = {"resources": {"nodes": 2}}
    api.call("POST", api.path("services"), {"metadata": {"name": "ftj-taken-train-1"}, "spec": {"clusterIP": "None"}})
    api.create(finetunejob("taken", **several))
    api.until("taken", lambda s: s.get("phase") == "Failed")
    api.create(finetunejob("pair", **several))
    api.until("pair", lambda s: s.get("jobRef"))
    api.patch("finetunejobs", "pair", {"spec": {"suspend": True}})
    wait(lambda: api.get("services", "ftj-pair-train-1") is None, "removal of the Service")
    # A merged model is asked for by the one that needs it.
    api.create(adaptermerge("merge"))
    api.end_pod(api.merges.pod("merge"), 20)
    api.create(finetunejob("needing", model={"fromMerge": "merge"}))
    api.until("needing", lambda s: s.get("phase") == "Failed")
    for name in ("bot", "stopped", "taken", "pair", "needing"):
        api.delete("finetunejobs", name)
    api.delete("adaptermerges", "merge")
    wait(lambda: not api.items("finetunejobs") + api.items("adaptermerges"), "removal of the workloads")
    wait(lambda: set(proxy.count()) >= EXPECTED, f"use of {EXPECTED - set(proxy.count())}")
    return set(proxy.count())


def test_permissions_are_exactly_what_is_used(used: set[tuple[str, str, str]]) -> None:
    """Nothing is granted that is never used, and nothing is asked for that is not granted."""
    assert used == EXPECTED
