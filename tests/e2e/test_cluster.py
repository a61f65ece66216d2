"""The test cluster itself: it comes up after crashes, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, down, find, gobuild, images, mounts, paths, processes, up

NAME = "crash-test"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Gives a cache folder of its own with the programs of the usual one, so that the other tests' cluster stays up."""
    # Not tmp_path: sockets lie below it, and a socket's path may have 107 bytes only.
    folder = Path(tempfile.mkdtemp(prefix="tw-"))
    programs = folder / "programs"
    programs.mkdir()
    for name, program in gobuild.build("full").items():
        (programs / name).symlink_to(program)
    monkeypatch.setenv("TUNEWRIGHT_KUBE_ASSETS", str(programs))
    monkeypatch.setenv("TUNEWRIGHT_CACHE", str(folder))
    yield folder
    down(NAME)
    shutil.rmtree(folder)


def kubectl(cluster: Cluster, *arguments: str) -> str:
    """Runs kubectl against `cluster`; returns what it prints."""
    command = [str(cluster.kubectl), f"--kubeconfig={cluster.kubeconfig}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_pod(cluster: Cluster) -> str:
    """Runs a pod until it is ready; returns its address."""
    assert cluster.registry is not None
    image = images.push(images.build_pause_image(gobuild.build("full")["pause"]), cluster.registry)
    kubectl(cluster, "run", "holder", f"--image={image}")
    kubectl(cluster, "wait", "--for=condition=Ready", "pod/holder", "--timeout=60s")
    return kubectl(cluster, "get", "pod", "holder", "-o", "jsonpath={.status.podIP}")


def traces(cache: Path) -> list[str]:
    """Returns what is left of a cluster: processes, mounts, links, namespaces, groups and sockets."""
    folder = paths.cluster(NAME)
    return [
        *(str(process) for process in processes.running(folder)),
        *(str(point) for point in mounts.under(cache)),
        *(str(path) for path in Path("/sys/fs/cgroup").rglob(processes.cgroup(folder))),
        *(str(path) for path in [folder] if path.exists()),
    ]


def networks() -> set[str]:
    """Returns the links, namespaces, routes and runtime folders of all clusters on this machine."""
    routes = subprocess.run(["ip", "route"], check=True, capture_output=True, text=True).stdout.splitlines()
    places = [("/sys/class/net", "tunewright*"), ("/var/run/netns", "*"), ("/run", "tunewright*")]
    names = {str(path) for place, pattern in places for path in Path(place).glob(pattern)}
    return {*names, *routes} - {"/run/tunewright.lock"}


def component(name: str) -> int:
    """Returns the process id of a component of the cluster."""
    return next(p.pid for p in processes.running(paths.cluster(NAME)) if p.component == name)


def test_down_leaves_nothing_behind(cache: Path) -> None:
    """A cluster with a running pod goes away without a trace, and `down` may be called twice."""
    before = networks()
    cluster = up("full", NAME)
    assert run_pod(cluster).startswith("10.244.")
    assert {process.component for process in processes.running(paths.cluster(NAME))} >= {"kubelet", "container"}
    down(NAME)
    assert traces(cache) == []
    assert networks() <= before
    down(NAME)


@pytest.mark.parametrize("victim", ["containerd", "etcd"])
def test_up_after_a_component_was_killed(cache: Path, victim: str) -> None:
    """A cluster that lost a component counts as down; `up` replaces it by one that runs pods."""
    before = networks()
    run_pod(up("full", NAME))
    os.kill(component(victim), signal.SIGKILL)
    time.sleep(0.5)
    assert find(NAME) is None
    run_pod(up("full", NAME))
    down(NAME)
    assert traces(cache) == []
    assert networks() <= before


@pytest.mark.parametrize("after_seconds", [1, 4])
def test_up_after_the_tool_was_killed(cache: Path, after_seconds: float) -> None:
    """Killing `up` at any time leaves something that the next `up` cleans and replaces."""
    before = networks()
    command = [sys.executable, "-m", "tests.cluster", "up", f"--name={NAME}"]
    with subprocess.Popen(command, cwd=paths.REPOSITORY, stdout=subprocess.DEVNULL) as tool:
        time.sleep(after_seconds)
        tool.kill()
    run_pod(up("full", NAME))
    down(NAME)
    assert traces(cache) == []
    assert networks() <= before


def test_control_planes_live_side_by_side(cache: Path) -> None:
    """Two small clusters differ, and the end of one does not touch the other."""
    first, second = up("control-plane", NAME), up("control-plane", f"{NAME}-2")
    try:
        kubectl(first, "create", "namespace", "only-here")
        assert "only-here" not in kubectl(second, "get", "namespaces")
        down(NAME)
        assert "default" in kubectl(second, "get", "namespaces")
    finally:
        down(f"{NAME}-2")


def test_up_finds_a_running_cluster(cache: Path) -> None:
    """The second `up` returns the same cluster, and another profile under its name is refused."""
    first = up("control-plane", NAME)
    assert up("control-plane", NAME) == first
    with pytest.raises(ValueError, match="runs with profile control-plane"):
        up("full", NAME)


def test_prebuilt_programs_must_be_complete(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of an incomplete folder of programs names what is missing."""
    monkeypatch.setenv("TUNEWRIGHT_KUBE_ASSETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"lacks .*etcd.*kubelet"):
        up("full", NAME)
