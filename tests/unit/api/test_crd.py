"""The generated CRD is what the API server accepts as a structural schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunewright_api import reference
from tunewright_api.crd import CUSTOM_RESOURCES, CustomResource, crd, render

ROOT = Path(__file__).parents[3]
# https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
FORBIDDEN = {"$ref", "$defs", "definitions", "nullable", "const", "prefixItems", "title", "oneOf", "allOf", "not"}


@pytest.fixture(params=CUSTOM_RESOURCES, ids=lambda of: of.kind)
def of(request: pytest.FixtureRequest) -> CustomResource:
    """Each kind."""
    given: CustomResource = request.param
    return given


@pytest.fixture
def schema(of: CustomResource) -> dict[str, Any]:
    """The schema of the only version."""
    (version,) = crd(of)["spec"]["versions"]
    return dict(version["schema"]["openAPIV3Schema"])


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema below a node with its path."""
    yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from nodes(node["additionalProperties"], f"{path}{{}}")


def test_every_node_has_a_type_and_nothing_forbidden(schema: dict[str, Any]) -> None:
    """The rules of structural schemas."""
    for path, node in nodes(schema):
        # hyperparameters.extra takes numbers, text and booleans, which has no other schema.
        free = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
        assert "type" in node or free, path
        assert not FORBIDDEN & set(node), path


def test_every_text_list_and_map_of_the_spec_is_bounded(schema: dict[str, Any]) -> None:
    """Without bounds the API server cannot estimate the cost of the rules and refuses the CRD."""
    for path, node in nodes(schema["properties"]["spec"], "spec"):
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


def test_every_field_of_the_spec_is_described(schema: dict[str, Any]) -> None:
    """`kubectl explain` has something to say; what is Kubernetes' own is described there."""
    for path, node in nodes(schema["properties"]["spec"], "spec"):
        own = not path.startswith(("spec.pod.affinity.", "spec.pod.tolerations[]", "spec.pod.imagePullSecrets[]"))
        if own and not path.endswith(("[]", "{}")):
            assert node.get("description"), path


def test_the_status_has_no_defaults_and_nothing_required_at_the_top(schema: dict[str, Any]) -> None:
    """The API server must not invent what the operator has not observed."""
    status = schema["properties"]["status"]
    assert not [path for path, node in nodes(status) if "default" in node]
    assert not status.get("required")


def test_conditions_merge_by_type(schema: dict[str, Any]) -> None:
    """Two writers of different conditions do not undo each other."""
    conditions = schema["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


@pytest.mark.parametrize("path", [str(path) for path in render()])
def test_the_committed_crds_are_up_to_date(path: str) -> None:
    """`make generate` was run."""
    assert (ROOT / path).read_text() == {str(p): text for p, text in render().items()}[path]


def test_the_committed_reference_is_up_to_date() -> None:
    """`make generate` was run."""
    assert (ROOT / reference.REFERENCE_PATH).read_text() == reference.render()


def test_the_reference_explains_every_reason_and_exit_code() -> None:
    """No empty cell where a user looks for a meaning."""
    lines = reference.render().splitlines()
    start = lines.index("### Reasons of the operator")
    assert not [line for line in lines[start:] if "|  |" in line]


def test_the_columns_of_kubectl_get_name_real_fields(of: CustomResource) -> None:
    """A misspelt JSONPath would show an empty column."""
    (version,) = crd(of)["spec"]["versions"]
    known = {path for path, _ in nodes(version["schema"]["openAPIV3Schema"])} | {".metadata.creationTimestamp"}
    assert {column["jsonPath"] for column in version["additionalPrinterColumns"]} <= known


def test_the_plain_file_is_valid_yaml_of_the_same_object(of: CustomResource) -> None:
    """What is applied with kubectl is what the code defines."""
    assert yaml.safe_load((ROOT / "crds" / f"{of.plural}.yaml").read_text()) == crd(of)
