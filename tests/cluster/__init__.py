"""A real Kubernetes cluster for tests and the demo, without Docker: `python -m tests.cluster up`.

cluster = up("control-plane")
subprocess.run([cluster.kubectl, f"--kubeconfig={cluster.kubeconfig}", "get", "namespaces"])
down(cluster.name)
"""

from __future__ import annotations

from tests.cluster.embedded import DEFAULT_NAME, Cluster, down, find, up

__all__ = ["DEFAULT_NAME", "Cluster", "down", "find", "up"]
