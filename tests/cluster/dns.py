"""CoreDNS for the pods: names of Services, and of pods behind a headless one. It knows no name outside the cluster."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.cluster import processes

DOMAIN = "cluster.local"
_READY_PORT = 8181

_COREFILE = """\
{domain}:53 {{
    bind {address}
    errors
    ready {address}:{port}
    kubernetes {domain} {{
        kubeconfig {kubeconfig}
    }}
}}
"""


def start(program: Path, folder: Path, namespace: str, address: str, kubeconfig: Path) -> None:
    """Starts CoreDNS for the cluster in `folder` on port 53 of `address` and waits until it knows the Services.

    Args:
        program: CoreDNS.
        folder: folder of the cluster.
        namespace: network namespace that has the address.
        address: where pods ask; the kubelet tells them.
        kubeconfig: of somebody who may list Services, endpoints and namespaces.

    Raises:
        RuntimeError: it did not start; the message carries the end of its log.
    """
    file = folder / "Corefile"
    file.write_text(_COREFILE.format(domain=DOMAIN, address=address, port=_READY_PORT, kubeconfig=kubeconfig))
    processes.start("coredns", [str(program), f"-conf={file}"], folder, namespace=namespace)
    processes.wait_until(lambda: _is_ready(address), folder, "coredns")


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}:{_READY_PORT}/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
