"""FineTuneJobs and AdapterMerges as the API server has them, read with the user's own kubeconfig."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from kubernetes.client import ApiException, Configuration, CustomObjectsApi
from kubernetes.config import ConfigException, list_kube_config_contexts, new_client_from_config
from urllib3.exceptions import HTTPError

from tunewright_api import GROUP, VERSION
from tunewright_api.crd import ADAPTERMERGE, CUSTOM_RESOURCES, FINETUNEJOB, CustomResource
from tunewright_cli.errors import AccessDenied, CliError, InvalidArgument, NotFound, Unavailable

TIMEOUT_SECONDS = 10


class Target(NamedTuple):
    """A workload that a command is about."""

    of: CustomResource
    name: str

    @property
    def is_merge(self) -> bool:
        """Whether it is an AdapterMerge."""
        return self.of is ADAPTERMERGE

    def __str__(self) -> str:
        """Return kind and name."""
        return f"{self.of.kind} {self.name!r}"


def target_of(text: str) -> Target:
    """Return what NAME (a FineTuneJob) or KIND/NAME stands for; kinds as kubectl takes them.

    Raises:
        InvalidArgument: There is no such kind.
    """
    kind, slash, name = text.rpartition("/")
    if not slash:
        return Target(FINETUNEJOB, text)
    for of in CUSTOM_RESOURCES:
        # kubectl takes the group as well.
        if kind.lower().removesuffix(f".{GROUP}") in (of.kind.lower(), of.plural, of.short_name):
            return Target(of, name)
    known = ", ".join(f"{of.kind.lower()}/{name}" for of in CUSTOM_RESOURCES)
    raise InvalidArgument(f"{kind!r} is not a kind: use one of {known}")


class Workloads:
    """The FineTuneJobs and AdapterMerges of one namespace."""

    def __init__(self, namespace: str | None, context: str | None) -> None:
        """Read the kubeconfig.

        Args:
            namespace: Default: that of the context.
            context: Default: the current one.

        Raises:
            InvalidArgument: There is no kubeconfig, or no such context in it.
        """
        try:
            contexts, current = list_kube_config_contexts()  # type: ignore[no-untyped-call]
            # No retries: the caller decides about further tries.
            client = new_client_from_config(  # type: ignore[no-untyped-call]
                context=context, client_configuration=Configuration(retries=0)
            )
        except ConfigException as error:
            raise InvalidArgument(f"kubeconfig: {error} (set KUBECONFIG or --context)") from None
        chosen = next((c for c in contexts if c["name"] == context), current)
        self.namespace = namespace or str(chosen["context"].get("namespace") or "default")
        self._api = CustomObjectsApi(client)

    def get(self, target: Target) -> dict[str, Any]:
        """Return one of them.

        Raises:
            NotFound: There is none of that name, or the cluster does not know its kind.
            AccessDenied: Not logged in, or no right to read it.
            Unavailable: No answer.
        """
        try:
            found = self._api.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, target.of.plural, target.name, _request_timeout=TIMEOUT_SECONDS
            )
        except ApiException as error:
            raise self._translated(error, target) from None
        except HTTPError as error:
            raise Unavailable(f"the API server does not answer: {error}") from None
        return cast(dict[str, Any], found)

    def _translated(self, error: ApiException, target: Target) -> CliError:
        if error.status == 404 and "page not found" in (error.body or ""):
            return NotFound(f"this cluster knows no {target.of.kind}s: install the chart")
        if error.status == 404:
            return NotFound(f"no {target} in namespace {self.namespace!r}")
        if error.status == 401:
            return AccessDenied("the API server does not accept the kubeconfig's credentials: log in again")
        if error.status == 403:
            return AccessDenied(f"no right to get {target.of.plural} in namespace {self.namespace!r}")
        return Unavailable(f"the API server answers {error.status} {error.reason}")
