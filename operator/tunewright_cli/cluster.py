"""FineTuneJobs as the API server has them, read with the user's own kubeconfig."""

from __future__ import annotations

from typing import Any, cast

from kubernetes.client import ApiException, Configuration, CustomObjectsApi
from kubernetes.config import ConfigException, list_kube_config_contexts, new_client_from_config
from urllib3.exceptions import HTTPError

from tunewright_api import GROUP, VERSION
from tunewright_api.v1alpha1.finetunejob import PLURAL
from tunewright_cli.errors import AccessDenied, CliError, InvalidArgument, NotFound, Unavailable

TIMEOUT_SECONDS = 10


class FineTuneJobs:
    """The FineTuneJobs of one namespace."""

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

    def get(self, name: str) -> dict[str, Any]:
        """Return one FineTuneJob.

        Raises:
            NotFound: There is none of that name, or the cluster does not know FineTuneJobs.
            AccessDenied: Not logged in, or no right to read it.
            Unavailable: No answer.
        """
        try:
            found = self._api.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=TIMEOUT_SECONDS
            )
        except ApiException as error:
            raise self._translated(error, name) from None
        except HTTPError as error:
            raise Unavailable(f"the API server does not answer: {error}") from None
        return cast(dict[str, Any], found)

    def _translated(self, error: ApiException, name: str) -> CliError:
        if error.status == 404 and "page not found" in (error.body or ""):
            return NotFound("this cluster knows no FineTuneJobs: install the chart")
        if error.status == 404:
            return NotFound(f"no FineTuneJob {name!r} in namespace {self.namespace!r}")
        if error.status == 401:
            return AccessDenied("the API server does not accept the kubeconfig's credentials: log in again")
        if error.status == 403:
            return AccessDenied(f"no right to get finetunejobs in namespace {self.namespace!r}")
        return Unavailable(f"the API server answers {error.status} {error.reason}")
