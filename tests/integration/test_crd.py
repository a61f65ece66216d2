"""The real API server takes the CRDs (within its CEL budget) and gives the verdict of the case table."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.conftest import Api
from tests.rule_cases import BEFORE, CASES, MERGE_BEFORE, UNKNOWN_FIELDS, UPDATES, Case, Update

DRY = {"dryRun": "All", "fieldValidation": "Strict"}


@pytest.fixture(scope="module")
def place(client: Any) -> Api:
    """Give an empty namespace; nothing in it is ever run."""
    name = "crd"
    found = Api(client, name)
    found.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(place: Api, case: Case) -> None:
    """A valid document is taken; a refusal says which rule or field is meant."""
    response = place.client.post(place.path(case.plural), json=case.document(), params=DRY)
    if case.accepted:
        assert response.status_code == 201, response.text
    else:
        assert response.status_code == 422, response.text
        assert case.part in response.json()["message"]


@pytest.mark.parametrize(("case", "field", "meant"), UNKNOWN_FIELDS, ids=[field for _, field, _ in UNKNOWN_FIELDS])
def test_unknown_field(place: Api, case: Case, field: str, meant: str | None) -> None:
    """A field that the schema does not have is refused by strict validation, which kubectl asks for."""
    response = place.client.post(place.path(case.plural), json=case.document(), params=DRY)
    assert response.status_code == 400, response.text
    assert 'unknown field "spec.' in response.json()["message"]
    assert field in response.json()["message"]


@pytest.fixture(scope="module")
def existing(place: Api) -> None:
    """Create an object of each kind to update."""
    for case in (BEFORE, MERGE_BEFORE):
        place.create(case.document())


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: f"{update.before.kind}: {update.name}")
@pytest.mark.usefixtures("existing")
def test_update(place: Api, update: Update) -> None:
    """What shapes the run cannot change; the refusal says what to do instead."""
    response = place.client.patch(
        place.path(update.before.plural, update.before.job_name),
        json={"spec": update.patch},
        headers={"Content-Type": "application/merge-patch+json"},
        params=DRY,
    )
    if update.accepted:
        assert response.status_code == 200, response.text
    else:
        assert response.status_code == 422, response.text
        assert update.part in response.json()["message"]
