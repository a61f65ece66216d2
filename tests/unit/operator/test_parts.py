"""Small parts: logs, metrics, errors, requests' names, merge patches, kopf's settings."""

from __future__ import annotations

import json
import logging

import pytest

from tunewright_operator import errors, kube, metrics
from tunewright_operator.apply import _difference
from tunewright_operator.handlers import build_settings
from tunewright_operator.kube import _path
from tunewright_operator.log import JsonFormatter


def test_log_lines() -> None:
    """A record is one line of JSON with its extra fields, and the traceback in it."""
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "two\nlines", "finetunejob": "a/b"})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    document = json.loads(line)
    assert (document["message"], document["finetunejob"], document["level"]) == ("two\nlines", "a/b", "info")


def test_metrics_have_help_and_no_names() -> None:
    """Every metric is described, and no label would grow with the number of objects."""
    families = [family for family in metrics.REGISTRY.collect() if family.name.startswith("tunewright_")]
    assert len(families) > 10
    allowed = {"result", "namespace", "phase", "reason", "kind", "verb", "resource", "code", "version", "le"}
    for family in families:
        assert family.documentation, family.name
        assert {label for sample in family.samples for label in sample.labels} <= allowed, family.name


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (422, errors.Invalid),
        (500, errors.ApiError),
    ],
)
def test_error_of_a_status(status: int, kind: type[errors.ApiError]) -> None:
    """Each HTTP status has one meaning."""
    assert type(errors.api_error(status, "R", "m")) is kind


def test_paths() -> None:
    """Names are escaped, and no namespace means all."""
    assert _path(kube.JOBS, "a", "b") == "apis/batch/v1/namespaces/a/jobs/b"
    assert _path(kube.PODS, None) == "api/v1/pods"
    assert _path(kube.PODS, "../x", "y/z") == "api/v1/namespaces/..%2Fx/pods/y%2Fz"


def test_merge_patches() -> None:
    """A patch holds what changed; what is no longer there is null, also one level down."""
    old = {"same": 1, "changed": {"kept": 1, "gone": 2}, "gone": [1]}
    new = {"same": 1, "changed": {"kept": 1, "new": 3}, "list": [1]}
    assert _difference(old, new) == {"changed": {"kept": 1, "new": 3, "gone": None}, "list": [1], "gone": None}
    assert _difference(new, new) == {}


def test_kopf_only_watches() -> None:
    """kopf posts nothing, stores nothing, scans nothing, and asks for our Jobs and pods only."""
    settings = build_settings()
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    assert settings.peering.standalone
    assert dict(settings.watching.label_selectors).values()
    assert settings.persistence.diffbase_storage.build(body=None) == {}  # type: ignore[arg-type]
    assert (settings.watching.server_timeout, settings.watching.client_timeout) == (300, 310)
