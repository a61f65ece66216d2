"""The network namespace of the full profile: the machine's own network is left alone.

The host has one end of a veth pair, the namespace the other. The namespace has no default route, so nothing in the
cluster reaches beyond the host, and an attempt to do so fails at once instead of hanging.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import paths
from tests.cluster.control_plane import SERVICE_NETWORK

# Enough for one cluster per developer or CI job on a machine, and small enough to look through.
_MOST = 10


@dataclass(frozen=True)
class Network:
    """Names and addresses of one cluster; the number keeps several on one machine apart."""

    number: int

    @property
    def name(self) -> str:
        """Name of the namespace, of the link and of the pods' network."""
        return f"tunewright{self.number}"

    @property
    def host(self) -> str:
        """Address of the host's end: servers on the host that pods must reach listen here."""
        return f"10.77.{self.number}.1"

    @property
    def node(self) -> str:
        """Address of the namespace's end: the API server, the kubelet and the name server."""
        return f"10.77.{self.number}.2"

    @property
    def pods(self) -> str:
        """Addresses of the pods; the host has a route to them."""
        return f"10.244.{self.number}.0/24"

    @property
    def runtime(self) -> Path:
        """Folder for sockets whose long names would not fit below the cache: a path may have 107 bytes only."""
        return Path("/run") / self.name

    def remove(self) -> None:
        """Removes all that `create` made; nothing happens when there is nothing."""
        if Path(f"/sys/class/net/{self.name}").exists():
            _run("ip", "link", "delete", self.name)
        if self._namespace.exists():
            _run("ip", "netns", "delete", self.name)

    @property
    def _namespace(self) -> Path:
        return Path("/var/run/netns") / self.name

    def is_free(self) -> bool:
        """Tells whether no process lives in the namespace; what a crash left of one counts as free."""
        if not self._namespace.exists():
            return True
        return not _run("ip", "netns", "pids", self.name).split()

    def make(self) -> None:
        """Makes the namespace, the link and the routes."""
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self.name, "type", "veth", "peer", "name", "node0", "netns", self.name)
        _run("ip", "address", "add", f"{self.host}/24", "dev", self.name)
        _run("ip", "link", "set", self.name, "up")
        inside = ("ip", "-n", self.name)
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{self.node}/24", "dev", "node0")
        _run(*inside, "link", "set", "node0", "up")
        # kube-proxy rewrites the address of a Service only after a route for it was found.
        _run(*inside, "route", "add", SERVICE_NETWORK, "via", self.host)
        _run("nsenter", f"--net={self._namespace}", "sysctl", "-qw", "net.ipv4.ip_forward=1")
        _run("ip", "route", "add", self.pods, "via", self.node)


def create(mark: Path) -> Network:
    """Makes the first free network and writes its number to `mark`, by which a later `remove` finds it.

    Raises:
        RuntimeError: a command failed, or all networks are in use; the message says which.
    """
    # One at a time: two clusters that start together must not choose the same number.
    with paths.locked(Path("/run/tunewright.lock")):
        for network in map(Network, range(_MOST)):
            if network.is_free():
                network.remove()
                mark.write_text(str(network.number))
                network.make()
                return network
    raise RuntimeError(
        f"all networks from {Network(0).name} to {Network(_MOST - 1).name} are in use: take a cluster down with"
        " `python -m tests.cluster down --name NAME`"
    )


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
    return result.stdout
