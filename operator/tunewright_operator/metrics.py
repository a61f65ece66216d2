"""Prometheus metrics. No label carries an object's name: their number would grow without bound."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

REGISTRY: Final = CollectorRegistry()
"""The operator's own registry: the library's global one could not be made anew in tests."""

ProcessCollector(registry=REGISTRY)

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_HOURS_BUCKETS = (1, 10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)

RECONCILES: Final = Counter(
    "tunewright_reconcile", "Passes over a workload, by result (ok, error).", ["result"], registry=REGISTRY
)
RECONCILE_SECONDS: Final = Histogram(
    "tunewright_reconcile_duration_seconds", "Length of a pass.", buckets=_SECONDS_BUCKETS, registry=REGISTRY
)
QUEUE_DEPTH: Final = Gauge("tunewright_workqueue_depth", "Keys that wait for a worker.", registry=REGISTRY)
QUEUE_RETRIES: Final = Counter(
    "tunewright_workqueue_retries", "Passes that failed and were put back with backoff.", registry=REGISTRY
)
QUEUE_LATENCY: Final = Histogram(
    "tunewright_workqueue_latency_seconds",
    "Wait of a key for a worker.",
    buckets=_SECONDS_BUCKETS,
    registry=REGISTRY,
)
WORKLOADS: Final = Gauge(
    "tunewright_workloads",
    "FineTuneJobs and AdapterMerges by kind, namespace and phase.",
    ["kind", "namespace", "phase"],
    registry=REGISTRY,
)
TRANSITIONS: Final = Counter(
    "tunewright_transitions",
    "Transitions that an event was posted for, by its reason.",
    ["reason"],
    registry=REGISTRY,
)
QUEUE_WAIT_SECONDS: Final = Histogram(
    "tunewright_queue_wait_seconds",
    "From the creation of an attempt's Job to the start of its last pod, by kind.",
    ["kind"],
    buckets=_HOURS_BUCKETS,
    registry=REGISTRY,
)
RUN_DURATION_SECONDS: Final = Histogram(
    "tunewright_run_duration_seconds",
    "From the first start to the end, by kind and result (Complete, Failed).",
    ["kind", "result"],
    buckets=_HOURS_BUCKETS,
    registry=REGISTRY,
)
CHILD_CREATE_ERRORS: Final = Counter(
    "tunewright_child_create_errors",
    "Jobs and Services that the API server refused, by its reason.",
    ["reason"],
    registry=REGISTRY,
)
API_REQUESTS: Final = Counter(
    "tunewright_api_requests",
    "Requests to the API server besides watches, by verb, resource and HTTP status.",
    ["verb", "resource", "code"],
    registry=REGISTRY,
)
WATCH_EVENTS: Final = Counter(
    "tunewright_watch_events", "Objects that the watches delivered, by resource.", ["resource"], registry=REGISTRY
)
PROGRESS_PULLS: Final = Counter(
    "tunewright_progress_pulls", "Requests to pods for their progress, by result (ok, error).", ["result"],
    registry=REGISTRY,
)  # fmt: skip
BUILD_INFO: Final = Gauge("tunewright_build_info", "Always 1; carries the version.", ["version"], registry=REGISTRY)
