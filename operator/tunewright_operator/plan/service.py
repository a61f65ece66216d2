"""The headless Service of an attempt with several pods: a host name for each of them."""

from __future__ import annotations

from typing import Any

from tunewright_operator import constants, naming
from tunewright_operator.kinds import Workload, kind_of
from tunewright_operator.plan.job import attempt_labels, owner_reference, pod_selector

Manifest = dict[str, Any]


def build_service(workload: Workload, attempt: int) -> Manifest:
    """Return the Service of an attempt: pod `N` is found as `<job>-N.<service>` in the namespace.

    It belongs to the workload and not to the Job, which is created after it.
    """
    metadata, kind = workload.metadata, kind_of(workload)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": naming.service_name(naming.job_name(kind, metadata.name, attempt)),
            "namespace": metadata.namespace,
            "labels": attempt_labels(kind, metadata.name, attempt),
            "ownerReferences": [owner_reference(workload)],
        },
        "spec": {
            # Names of pods, and no address of its own.
            "clusterIP": "None",
            # The pods look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": pod_selector(workload, attempt),
            "ports": [{"name": "master", "port": constants.MASTER_PORT}],
        },
    }
