"""The full profile: control plane, node, registry and S3 server in and beside a network namespace."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cluster import cgroups, debian, images, mounts, network, node, paths, processes, registry, s3
from tests.cluster.certificates import Authority
from tests.cluster.control_plane import ControlPlane

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
    network.create()
    registry_address = registry.start(programs["registry"], folder, network.HOST)
    storage = folder / "s3"
    processes.start("s3", s3.server_command(storage, network.HOST, S3_PORT), folder)
    plane = ControlPlane(folder, programs, network.NODE, API_PORT, network.NAMESPACE)
    pause = images.push(images.build_pause_image(programs["pause"]), registry_address)
    one = node.Node(plane, registry_address, pause)
    one.start_containerd()
    authority = Authority(folder / "pki")
    plane.start(authority)
    one.start(authority)
    server = s3.S3Server(f"http://{network.HOST}:{S3_PORT}")
    s3.wait_ready(server.endpoint, folder / "logs" / "s3.log", lambda: _runs("s3", folder))
    return plane, registry_address, server


def remove(folder: Path) -> None:
    """Removes what a full cluster in `folder` leaves outside of it once its processes have ended."""
    mounts.remove(folder)
    mounts.remove(paths.cache() / "containerd")
    cgroups.remove(processes.cgroup(folder))
    node.remove_leftovers()
    network.remove()


def _runs(component: str, folder: Path) -> bool:
    return any(process.component == component for process in processes.running(folder))
