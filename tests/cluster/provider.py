"""Which cluster the demo and the end-to-end tests run on, with the project's images in it.

The embedded one, unless Docker runs (then kind) or `DEMO_CONTEXT` names a context of the kubeconfig.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from tests.cluster import embedded, gobuild, images, paths
from tests.cluster.embedded import Cluster
from tests.cluster.s3 import S3Server

KIND_NAME = "tunewright"
_CONTEXT_VARIABLES = ("DEMO_REGISTRY", "DEMO_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Provided:
    """A cluster and the names by which its nodes find the images."""

    cluster: Cluster
    operator_image: str
    trainer_image: str


def provide(environment: Mapping[str, str] = os.environ) -> Provided:
    """Return a running cluster with the images for the code as it is.

    Raises:
        ValueError: `DEMO_CONTEXT` is set without the variables that go with it.
        RuntimeError: The cluster or an image could not be made.
    """
    if "DEMO_CONTEXT" in environment:
        return _pushed(context(environment))
    if docker_runs():
        return kind()
    return _pushed(embedded.up("full"))


def context(environment: Mapping[str, str]) -> Cluster:
    """Return the cluster of a kubeconfig context, with a registry and an S3 server that its nodes reach.

    Raises:
        ValueError: Registry, S3 server or credentials are not named.
    """
    missing = [name for name in _CONTEXT_VARIABLES if not environment.get(name)]
    if missing:
        raise ValueError(f"DEMO_CONTEXT needs {', '.join(missing)} as well: a registry and an S3 server of the cluster")
    name = environment["DEMO_CONTEXT"]
    programs = gobuild.build("control-plane")
    kubeconfig = paths.cache() / "context.kubeconfig"
    view = ["config", "view", "--raw", "--minify", f"--context={name}"]
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text(_output([str(programs["kubectl"]), *view]))
    return Cluster(
        name=name,
        profile="full",
        kubeconfig=kubeconfig,
        kubectl=programs["kubectl"],
        helm=programs["helm"],
        registry=environment["DEMO_REGISTRY"],
        s3=S3Server(
            environment["DEMO_S3_ENDPOINT"], environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
        ),
    )


def docker_runs() -> bool:
    """Tell whether there is a Docker engine, and not only its client."""
    return shutil.which("docker") is not None and _run(["docker", "info"]).returncode == 0


def kind() -> Provided:
    """Return a kind cluster; images are loaded into its node, the S3 server listens on the node network's gateway."""
    programs = gobuild.build("control-plane")
    kubeconfig = paths.cache() / "kind.kubeconfig"
    if KIND_NAME not in _output(["kind", "get", "clusters"]).split():
        _output(["kind", "create", "cluster", "--name", KIND_NAME, "--wait", "180s"])
    _output(["kind", "export", "kubeconfig", "--name", KIND_NAME, "--kubeconfig", str(kubeconfig)])
    names = []
    for name, dockerfile in (("tunewright-operator", "Dockerfile"), ("tunewright-trainer", "trainer_image/Dockerfile")):
        image = f"{name}:{images.content_tag(dockerfile)}"
        _output(["docker", "build", "--tag", image, "--file", dockerfile, str(paths.REPOSITORY)])
        _output(["kind", "load", "docker-image", image, "--name", KIND_NAME])
        names.append(image)
    gateways = _output(["docker", "network", "inspect", "kind", "-f", "{{range .IPAM.Config}}{{.Gateway}} {{end}}"])
    address = next(gateway for gateway in gateways.split() if ":" not in gateway)
    cluster = Cluster(
        name=KIND_NAME,
        profile="full",
        kubeconfig=kubeconfig,
        kubectl=programs["kubectl"],
        helm=programs["helm"],
        registry=None,
        s3=S3Server.start(paths.cache() / "kind-s3", address),
    )
    return Provided(cluster, *names)


def _pushed(cluster: Cluster) -> Provided:
    assert cluster.registry is not None
    return Provided(
        cluster,
        images.push(images.build_operator_image(), cluster.registry),
        images.push(images.build_trainer_image(), cluster.registry),
    )


def _output(command: list[str]) -> str:
    result = _run(command)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{(result.stdout + result.stderr)[-3000:]}")
    return result.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=paths.REPOSITORY)
