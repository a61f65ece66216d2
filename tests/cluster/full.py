"""The full profile: control plane, node, registry and S3 server in and beside a network namespace."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cluster import cgroups, debian, dns, images, mounts, node, paths, processes, registry, s3
from tests.cluster.certificates import Authority
from tests.cluster.control_plane import ControlPlane
from tests.cluster.network import Network, create

S3_PORT = 8333
API_PORT = 6443


def start(folder: Path, programs: dict[str, Path]) -> tuple[ControlPlane, str, s3.S3Server]:
    """Starts everything in `folder` and waits until a pod can run; returns control plane, registry address, S3 server.

    Raises:
        RuntimeError: not root, a system package is missing, or a part did not start.
    """
    if os.geteuid() != 0:
        raise RuntimeError("the full profile needs root for namespaces and mounts; without it use `control-plane`")
    debian.require("nftables", "iproute2", "conntrack", "containernetworking-plugins", "buildah", "procps")
    network = create(_mark(folder))
    registry_address = registry.start(programs["registry"], folder, network.host)
    storage = folder / "s3"
    processes.start("s3", s3.server_command(storage, network.host, S3_PORT), folder)
    plane = ControlPlane(folder, programs, network.node, API_PORT, network.pods, network.name)
    pause = images.push(images.build_pause_image(programs["pause"]), registry_address)
    one = node.Node(plane, network, registry_address, pause)
    one.start_containerd()
    authority = Authority(folder / "pki")
    plane.start(authority)
    dns.start(programs["coredns"], folder, network.name, network.node, plane.kubeconfig)
    one.start(authority)
    server = s3.S3Server(f"http://{network.host}:{S3_PORT}")
    s3.wait_ready(server.endpoint, folder / "logs" / "s3.log", lambda: _runs("s3", folder))
    return plane, registry_address, server


def remove(folder: Path) -> None:
    """Removes what a full cluster leaves outside of `folder` once its processes have ended; others are left alone."""
    if not _mark(folder).exists():
        return
    network = Network(int(_mark(folder).read_text()))
    mounts.remove(folder)
    mounts.remove(paths.containerd(folder))
    cgroups.remove(processes.cgroup(folder))
    node.remove_leftovers(network)
    network.remove()


def _mark(folder: Path) -> Path:
    """The file that says which network the cluster has; written before anything outside of `folder` is made."""
    return folder / "network"


def _runs(component: str, folder: Path) -> bool:
    return any(process.component == component for process in processes.running(folder))
