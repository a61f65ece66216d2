"""The real API server takes the CRD (within its CEL budget) and gives the verdict of the case table."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.conftest import Api
from tests.rule_cases import BEFORE, CASES, UNKNOWN_FIELDS, UPDATES, Case, Update

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
    response = place.client.post(place.path("finetunejobs"), json=case.document(), params=DRY)
    if case.accepted:
        assert response.status_code == 201, response.text
    else:
        assert response.status_code == 422, response.text
        assert case.part in response.json()["message"]


@pytest.mark.parametrize(("changes", "field", "meant"), UNKNOWN_FIELDS, ids=lambda value: str(value))
def test_unknown_field(place: Api, changes: dict[str, Any], field: str, meant: str | None) -> None:
    """A field that the schema does not have is refused by strict validation, which kubectl asks for."""
    document = Case("x", False, changes).document()
    response = place.client.post(place.path("finetunejobs"), json=document, params=DRY)
    assert response.status_code == 400, response.text
    assert 'unknown field "spec.' in response.json()["message"]
    assert field in response.json()["message"]


@pytest.fixture(scope="module")
def existing(place: Api) -> str:
    """Give a FineTuneJob to update."""
    place.create(BEFORE.document() | {"metadata": {"name": BEFORE.job_name}})
    return BEFORE.job_name


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.name)
def test_update(place: Api, existing: str, update: Update) -> None:
    """What shapes the run cannot change; the refusal says what to do instead."""
    response = place.client.patch(
        place.path("finetunejobs", existing),
        json={"spec": update.patch},
        headers={"Content-Type": "application/merge-patch+json"},
        params=DRY,
    )
    if update.accepted:
        assert response.status_code == 200, response.text
    else:
        assert response.status_code == 422, response.text
        assert update.part in response.json()["message"]
