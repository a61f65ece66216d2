"""The API server as plain dictionaries: one shared client, no model classes.

kubernetes.aio's own methods turn every answer into model objects, which costs more time and memory than the request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import client, config

from tunewright_api import API_VERSION
from tunewright_operator import metrics
from tunewright_operator.constants import OPERATOR_NAME
from tunewright_operator.errors import ApiUnreachable, NoCluster, api_error
from tunewright_operator.kinds import Kind

Document = dict[str, Any]

_REQUEST_SECONDS = 30.0
_LIST_SECONDS = 120.0
_PAGE = 200

JOBS = "apis/batch/v1", "jobs"
PODS = "api/v1", "pods"
SERVICES = "api/v1", "services"
EVENTS = "api/v1", "events"

Resource = tuple[str, str]


def workloads(kind: Kind) -> Resource:
    """Return the resource of a kind of workloads."""
    return f"apis/{API_VERSION}", kind.plural


async def load_configuration() -> client.Configuration:
    """Return the connection to the cluster: the pod's service account, else the kubeconfig of $KUBECONFIG.

    Raises:
        NoCluster: There is neither.
    """
    configuration = client.Configuration()
    try:
        config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException:
        try:
            await config.load_kube_config(  # type: ignore[no-untyped-call]
                client_configuration=configuration, persist_config=False
            )
        except config.ConfigException as error:
            raise NoCluster(f"no service account and no usable kubeconfig: {error}; set KUBECONFIG") from None
    return configuration


async def bearer_token(configuration: client.Configuration) -> str | None:
    """Return the Authorization header, read anew where the token lies in a file; None with a client certificate."""
    # The client sets the header only for its own generated methods.
    header: str | None = await configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
    return header


class Kube:
    """Requests to the API server."""

    def __init__(self, configuration: client.Configuration, concurrency: int) -> None:
        """Open a client whose pool fits `concurrency` requests at once."""
        # Beyond the workers: lists of a resync, and the health check.
        configuration.connection_pool_maxsize = concurrency + 8
        # Without this aiohttp looks for a ~/.netrc before every request, in two hops to another thread. kopf does not
        # read the environment either; a proxy in the kubeconfig is used by both.
        configuration.client_session_kwargs = {"trust_env": False}
        self.configuration = configuration
        """Also tells kopf how to connect."""
        self._client = client.ApiClient(configuration)
        self.last_answer = time.monotonic()
        """Monotonic time of the last answer of any kind."""

    async def __aenter__(self) -> Kube:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    async def get(self, resource: Resource, namespace: str, name: str) -> Document:
        """Read an object. Raises an `ApiError` (NotFound when it is not there) or ApiUnreachable, as all here do."""
        return _decode(await self._request("get", resource, _path(resource, namespace, name)))

    async def create(self, resource: Resource, namespace: str, document: Document) -> Document:
        """Create an object and return its metadata, the only part that the API server can have added to."""
        return _decode(await self._request("create", resource, _path(resource, namespace), body=document))

    async def post(self, resource: Resource, namespace: str, document: Document) -> None:
        """Create an object that nobody looks at again: the answer is not parsed."""
        await self._request("create", resource, _path(resource, namespace), body=document)

    async def delete(self, resource: Resource, namespace: str, name: str) -> None:
        """Delete an object; what it owns is removed in the background."""
        await self._request(
            "delete", resource, _path(resource, namespace, name), body={"propagationPolicy": "Background"}
        )

    async def patch_status(self, resource: Resource, namespace: str, name: str, patch: Document) -> str:
        """Merge a patch into the status subresource and return the new resourceVersion."""
        group, plural = resource
        path = f"{_path(resource, namespace, name)}/status?{urlencode({'fieldManager': OPERATOR_NAME})}"
        answer = _decode(await self._request("patch", (group, f"{plural}/status"), path, body=patch))
        version: str = answer["metadata"]["resourceVersion"]
        return version

    async def list(
        self, resource: Resource, namespace: str | None, selector: str | None = None
    ) -> AsyncIterator[Document]:
        """Read all objects of a namespace (None: of all), page by page: never all at once in memory."""
        query = {"limit": str(_PAGE), **({"labelSelector": selector} if selector else {})}
        while True:
            path = f"{_path(resource, namespace)}?{urlencode(query)}"
            page = _decode(await self._request("list", resource, path, limit=_LIST_SECONDS))
            for item in page["items"]:
                yield item
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    async def _request(
        self, verb: str, resource: Resource, path: str, *, body: Document | None = None, limit: float = _REQUEST_SECONDS
    ) -> bytes:
        headers = {"Accept": _WHOLE if verb in ("get", "list") else _METADATA, "User-Agent": OPERATOR_NAME}
        if verb == "patch":
            headers["Content-Type"] = "application/merge-patch+json"
        token = await bearer_token(self.configuration)
        if token is not None:
            headers["Authorization"] = token
        code = "none"
        try:
            response = await self._client.rest_client.request(  # type: ignore[no-untyped-call]
                _METHODS[verb],
                f"{self.configuration.host}/{path}",
                headers=headers,
                body=body,
                _request_timeout=aiohttp.ClientTimeout(total=limit),
            )
            answer: bytes = await response.read()
            code = str(response.status)
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise ApiUnreachable(f"{verb} {path.split('?')[0]}: {error!r}") from error
        finally:
            metrics.API_REQUESTS.labels(verb, resource[1], code).inc()
        self.last_answer = time.monotonic()
        if response.status >= 400:
            document = _decode(answer)
            message = document.get("message") or answer.decode(errors="replace")[:500]
            raise api_error(response.status, document.get("reason", ""), message)
        return answer


_WHOLE = "application/json"
# What we wrote ourselves need not be sent back to us.
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"
_METHODS = {"get": "GET", "list": "GET", "create": "POST", "delete": "DELETE", "patch": "PATCH"}


def _decode(answer: bytes) -> Document:
    try:
        document = json.loads(answer)
    except ValueError:
        # A proxy in between answers in HTML; the status says the rest.
        return {}
    return document if isinstance(document, dict) else {}


def _path(resource: Resource, namespace: str | None, name: str | None = None) -> str:
    group, plural = resource
    scope = f"namespaces/{quote(namespace, safe='')}/" if namespace is not None else ""
    return f"{group}/{scope}{plural}" + (f"/{quote(name, safe='')}" if name is not None else "")
