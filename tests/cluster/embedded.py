"""Brings embedded clusters up and down, and finds those which run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.cluster import full, gobuild, paths, ports, processes
from tests.cluster.certificates import Authority
from tests.cluster.control_plane import ControlPlane
from tests.cluster.s3 import S3Server

Profile = Literal["control-plane", "full"]

DEFAULT_NAME = "tunewright"


@dataclass(frozen=True)
class Cluster:
    """A running cluster and what one needs to use it."""

    name: str
    profile: Profile
    kubeconfig: Path
    """For an administrator; usable from this machine."""
    kubectl: Path
    helm: Path
    registry: str | None
    """Address of a plain-HTTP registry that this machine and the node reach, such as 10.77.0.1:5000."""
    s3: S3Server | None
    """S3 server that this machine and pods reach."""


def up(profile: Profile, name: str = DEFAULT_NAME) -> Cluster:
    """Returns the cluster `name`, started if it does not run.

    A healthy cluster of the same profile is returned as it is. What a crash left of one is removed first, so the new
    one is always empty.

    Args:
        profile: `control-plane` has an API server and controllers but no node: pods stay Pending. `full` runs pods and
            needs root. Several of both can live at once.
        name: to tell clusters apart.

    Raises:
        ValueError: `name` is no DNS label, or runs with another profile.
        RuntimeError: a program could not be built or did not start; the message says which and where its log is.
    """
    folder = paths.cluster(name)
    with paths.locked(folder.with_suffix(".lock")):
        running = find(name)
        if running is not None and running.profile != profile:
            raise ValueError(
                f"cluster {name!r} runs with profile {running.profile}: take it down, or choose another name"
            )
        if running is not None:
            return running
        programs = gobuild.build(profile)
        _remove(folder)
        folder.mkdir(parents=True)
        cluster = _start_full(name, folder, programs) if profile == "full" else _start_plane(name, folder, programs)
        _record(cluster, folder)
        return cluster


def down(name: str = DEFAULT_NAME) -> None:
    """Ends cluster `name` and removes everything it made but the caches; does nothing when there is none.

    Raises:
        TimeoutError: a process does not end; the message names it.
    """
    folder = paths.cluster(name)
    with paths.locked(folder.with_suffix(".lock")):
        _remove(folder)


def find(name: str = DEFAULT_NAME) -> Cluster | None:
    """Returns cluster `name` if it was started completely and all of its components still run."""
    folder = paths.cluster(name)
    record = folder / "cluster.json"
    if not record.is_file():
        return None
    document = json.loads(record.read_text())
    alive = {process.component for process in processes.running(folder)}
    if not set(document.pop("components")) <= alive:
        return None
    return _cluster(name, document)


def _start_plane(name: str, folder: Path, programs: dict[str, Path]) -> Cluster:
    plane = ControlPlane(folder, programs, address="127.0.0.1", port=ports.free(1)[0])
    plane.start(Authority(folder / "pki"))
    kubectl, helm = programs["kubectl"], programs["helm"]
    return Cluster(name, "control-plane", plane.kubeconfig, kubectl, helm, registry=None, s3=None)


def _start_full(name: str, folder: Path, programs: dict[str, Path]) -> Cluster:
    plane, registry, s3 = full.start(folder, programs)
    kubectl, helm = programs["kubectl"], programs["helm"]
    return Cluster(name, "full", plane.kubeconfig, kubectl, helm, registry, s3)


def _remove(folder: Path) -> None:
    processes.stop(folder)
    full.remove(folder)
    if folder.exists():
        shutil.rmtree(folder)


def _record(cluster: Cluster, folder: Path) -> None:
    """Writes what `find` reads; last, so that a half-started cluster is never taken for a whole one."""
    document = {
        "profile": cluster.profile,
        "kubeconfig": str(cluster.kubeconfig),
        "kubectl": str(cluster.kubectl),
        "helm": str(cluster.helm),
        "registry": cluster.registry,
        "s3": cluster.s3.endpoint if cluster.s3 else None,
        "components": sorted({process.component for process in processes.running(folder)} - {"shim", "container"}),
    }
    (folder / "cluster.json").write_text(json.dumps(document, indent=1))


def _cluster(name: str, document: dict[str, Any]) -> Cluster:
    return Cluster(
        name=name,
        profile=document["profile"],
        kubeconfig=Path(document["kubeconfig"]),
        kubectl=Path(document["kubectl"]),
        helm=Path(document["helm"]),
        registry=document["registry"],
        s3=S3Server(document["s3"]) if document["s3"] else None,
    )
