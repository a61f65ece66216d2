"""What the operator is allowed to do, as (API group, resource, verb): exactly what it does, and nothing else.

The chart's Role must grant this set; integration tests compare it with the requests that the API server saw.
"""

from __future__ import annotations

EXPECTED: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("tunewright.dev", "finetunejobs", "get"),
        ("tunewright.dev", "finetunejobs", "list"),
        ("tunewright.dev", "finetunejobs", "watch"),
        ("tunewright.dev", "finetunejobs/status", "patch"),
        ("tunewright.dev", "adaptermerges", "get"),
        ("tunewright.dev", "adaptermerges", "list"),
        ("tunewright.dev", "adaptermerges", "watch"),
        ("tunewright.dev", "adaptermerges/status", "patch"),
        ("batch", "jobs", "get"),
        ("batch", "jobs", "list"),
        ("batch", "jobs", "watch"),
        ("batch", "jobs", "create"),
        ("batch", "jobs", "delete"),
        ("", "pods", "list"),
        ("", "pods", "watch"),
        ("", "services", "get"),
        ("", "services", "create"),
        ("", "services", "delete"),
        ("", "events", "create"),
    }
)
