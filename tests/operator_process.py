"""The operator as in production, for integration tests and benchmarks: CRDs, service account, permissions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import Cluster
from tests.operator_permissions import EXPECTED

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "tunewright-system"
ACCOUNT = "operator"


def kubectl(cluster: Cluster, *arguments: str, stdin: str | None = None) -> str:
    """Run kubectl as administrator and return what it prints.

    Raises:
        AssertionError: It failed; the message carries its output.
    """
    command = [str(cluster.kubectl), f"--kubeconfig={cluster.kubeconfig}", *arguments]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"kubectl {' '.join(arguments)}: {result.stdout}{result.stderr}"
    return result.stdout


def rules(without: frozenset[tuple[str, str, str]] = frozenset()) -> list[dict[str, Any]]:
    """Return the operator's permissions as RBAC rules, less some for tests of what happens then."""
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": [verb]}
        for group, resource, verb in sorted(EXPECTED - without)
    ]


def grant(cluster: Cluster, without: frozenset[tuple[str, str, str]] = frozenset()) -> None:
    """Install the CRDs, and the operator's service account with exactly the chart's permissions."""
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "tunewright"}
    api = "rbac.authorization.k8s.io/v1"
    documents = [
        *(yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))),
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": NAMESPACE}},
        {"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": "tunewright"}, "rules": rules(without)},
        {
            "apiVersion": api,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "tunewright"},
            "roleRef": role,
            "subjects": [subject],
        },
    ]
    kubectl(cluster, "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_dump_all(documents))
    names = [f"crd/{plural}.tunewright.dev" for plural in ("finetunejobs", "adaptermerges")]
    kubectl(cluster, "wait", "--for=condition=Established", *names, "--timeout=60s")


def kubeconfig_of(cluster: Cluster, folder: Path, server: str | None = None) -> Path:
    """Write a kubeconfig with a token of the operator's account and return its path.

    Args:
        cluster: Where `grant` was called.
        folder: Where the file goes.
        server: Another address than the API server's own: a proxy in between, without TLS.
    """
    token = kubectl(cluster, "create", "token", ACCOUNT, "-n", NAMESPACE, "--duration=24h").strip()
    document = yaml.safe_load(cluster.kubeconfig.read_text())
    if server is not None:
        document["clusters"][0]["cluster"] = {"server": server}
    document["users"][0]["user"] = {"token": token}
    path = folder / "operator.kubeconfig"
    # JSON is YAML, and needs no care about quoting.
    path.write_text(json.dumps(document))
    path.chmod(0o600)
    return path
