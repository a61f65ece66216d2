"""Writes: the only module that changes anything in the cluster."""

from __future__ import annotations

from typing import Any

from tunewright_api.v1alpha1.status import RunStatus
from tunewright_operator import kube, metrics
from tunewright_operator.errors import Conflict, Forbidden, Invalid, NotFound, RunTooLarge
from tunewright_operator.kinds import Key, Workload
from tunewright_operator.kube import Document, Kube, Resource
from tunewright_operator.observed import ObservedJob, Refusal, parse_job, parse_owner
from tunewright_operator.plan import build_job, build_service
from tunewright_operator.settings import Settings
from tunewright_operator.status import CreateJob, DeleteJobs
from tunewright_operator.store import Store


class Applier:
    """Creates and deletes Jobs and their Services, writes statuses."""

    def __init__(self, api: Kube, store: Store, settings: Settings) -> None:
        self._api = api
        self._store = store
        self._settings = settings

    async def create_job(self, workload: Workload, action: CreateJob) -> ObservedJob | Refusal:
        """Create the Job of an attempt, after the Service of several pods, or find what is there already."""
        try:
            manifest = build_job(workload, action.attempt, action.halvings, self._settings)
        except RunTooLarge as error:
            return Refusal("Invalid", str(error))
        if manifest["spec"]["completions"] > 1:
            service = await self._create(kube.SERVICES, workload, build_service(workload, action.attempt))
            if isinstance(service, Refusal):
                return service
        created = await self._create(kube.JOBS, workload, manifest)
        if isinstance(created, Refusal):
            return created
        self._store.put_job(created)
        return parse_job(created)

    async def _create(self, resource: Resource, workload: Workload, manifest: Document) -> Document | Refusal:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            answer = await self._api.create(resource, manifest["metadata"]["namespace"], manifest)
        except Conflict as error:
            if error.reason == "AlreadyExists":
                return await self._existing(resource, workload, manifest)
            raise
        except Forbidden as error:
            metrics.CHILD_CREATE_ERRORS.labels("Forbidden").inc()
            return Refusal("Forbidden", f"the API server refused {kind} {name}: {error.message}")
        except Invalid as error:
            metrics.CHILD_CREATE_ERRORS.labels("Invalid").inc()
            return Refusal("Invalid", f"the API server refused {kind} {name}: {error.message}")
        return {**manifest, "metadata": answer["metadata"]}

    async def _existing(self, resource: Resource, workload: Workload, manifest: Document) -> Document | Refusal:
        """Judge the object that has the name: ours, a predecessor's that is being removed, or a stranger's."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            raw = await self._api.get(resource, manifest["metadata"]["namespace"], name)
        except NotFound:
            return Refusal("Predecessor", f"{kind} {name} was there and has just gone")
        owner = parse_owner(raw)
        if owner.uid == workload.metadata.uid:
            return raw
        metrics.CHILD_CREATE_ERRORS.labels("AlreadyExists").inc()
        if owner.deleting or (owner.kind, owner.name) == (workload.kind, workload.metadata.name):
            return Refusal("Predecessor", f"waiting until {kind} {name} of an earlier {workload.kind} is removed")
        return Refusal(
            "Foreign",
            f"{kind} {name} exists and belongs to somebody else: remove it, or rename the {workload.kind}",
        )

    async def delete_jobs(self, key: Key, action: DeleteJobs) -> None:
        """Delete Jobs and, in the background, their pods."""
        # The Services first: who dies in between finds the Jobs, and with them the names of the Services.
        for resource, names in ((kube.SERVICES, action.services), (kube.JOBS, action.names)):
            for name in names:
                try:
                    await self._api.delete(resource, key.namespace, name)
                except NotFound:
                    continue

    async def write_status(self, key: Key, document: dict[str, Any], status: RunStatus) -> bool:
        """Write what has changed, against the version it was decided from; return whether there was anything.

        Raises:
            Conflict: The workload has changed since: the pass is to be repeated from a live read.
            NotFound: It is gone.
        """
        new = status.document()
        patch = _difference(document.get("status", {}), new)
        if not patch:
            return False
        body = {"metadata": {"resourceVersion": document["metadata"]["resourceVersion"]}, "status": patch}
        try:
            version = await self._api.patch_status(kube.workloads(key.kind), key.namespace, key.name, body)
        except Conflict:
            self._store.entry(key).text = None
            raise
        metadata = {**document["metadata"], "resourceVersion": version}
        self._store.put_workload(key.kind, {**document, "metadata": metadata, "status": new}, written=True)
        return True


def _difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the merge patch from one status to another; whole top-level fields, removed ones as null."""
    patch = {key: _replaced(old.get(key), value) for key, value in new.items() if old.get(key) != value}
    return {**patch, **{key: None for key in old if key not in new}}


def _replaced(old: object, new: object) -> object:
    """Return what makes `new` of `old`: in a merge patch, a key that is left out would stay."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**{key: None for key in old if key not in new}, **new}
    return new
