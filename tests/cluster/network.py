"""The network namespace of the full profile: the machine's own network is left alone.

The host has one end of a veth pair (HOST), the namespace the other (NODE). The namespace has no default route, so
nothing in the cluster reaches beyond the host, and an attempt to do so fails at once instead of hanging.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster.control_plane import SERVICE_NETWORK

NAMESPACE = "tunewright"
HOST = "10.77.0.1"
"""Servers on the host that pods must reach listen here."""
NODE = "10.77.0.2"
"""The API server and the kubelet."""
NODE_PODS = "10.244.0.0/24"
"""Addresses of the pods, routed from the host."""

_LINK = "tunewright0"


def create() -> None:
    """Makes the namespace, the link and the routes; what a crash left of them is removed first.

    Raises:
        RuntimeError: a command failed, or another cluster lives in the namespace; the message says which.
    """
    occupants = _occupants()
    if occupants:
        raise RuntimeError(
            f"network namespace {NAMESPACE} is in use by processes {' '.join(occupants)}: only one full cluster fits on"
            " a machine; take the other one down with `python -m tests.cluster down --name NAME`"
        )
    remove()
    _run("ip", "netns", "add", NAMESPACE)
    _run("ip", "link", "add", _LINK, "type", "veth", "peer", "name", "node0", "netns", NAMESPACE)
    _run("ip", "address", "add", f"{HOST}/24", "dev", _LINK)
    _run("ip", "link", "set", _LINK, "up")
    inside = ("ip", "-n", NAMESPACE)
    _run(*inside, "link", "set", "lo", "up")
    _run(*inside, "address", "add", f"{NODE}/24", "dev", "node0")
    _run(*inside, "link", "set", "node0", "up")
    # kube-proxy rewrites the address of a Service only after a route for it was found.
    _run(*inside, "route", "add", SERVICE_NETWORK, "via", HOST)
    _run("nsenter", f"--net=/var/run/netns/{NAMESPACE}", "sysctl", "-qw", "net.ipv4.ip_forward=1")
    _run("ip", "route", "add", NODE_PODS, "via", NODE)


def remove() -> None:
    """Removes all that `create` made; nothing happens when there is nothing."""
    if Path(f"/sys/class/net/{_LINK}").exists():
        _run("ip", "link", "delete", _LINK)
    if Path(f"/var/run/netns/{NAMESPACE}").exists():
        _run("ip", "netns", "delete", NAMESPACE)


def _occupants() -> list[str]:
    if not Path(f"/var/run/netns/{NAMESPACE}").exists():
        return []
    result = subprocess.run(["ip", "netns", "pids", NAMESPACE], capture_output=True, text=True)
    return result.stdout.split()


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {result.stderr.strip()}; are you root?")
