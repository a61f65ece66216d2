"""Command line of the test cluster: `python -m tests.cluster --help`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.cluster import DEFAULT_NAME, Cluster, down, find, gguftools, gobuild, images, paths, processes, up


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit code: 0, or 1 with a message for errors that a user can act on."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="A Kubernetes cluster for tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, description in (
        ("build", "build the programs of a profile, without starting anything"),
        ("up", "start a cluster, or find the one that runs; prints the path of its kubeconfig"),
        ("down", "end a cluster and remove everything it made but the caches"),
        ("status", "say what runs"),
        ("kubeconfig", "print the path of the kubeconfig"),
        ("gguf-tools", "build the tools of the GGUF export; prints their folder"),
        ("images", "build the operator and trainer images; push them if a cluster runs"),
        ("load-image", "push an image to the cluster's registry; prints its name there"),
    ):
        sub = commands.add_parser(command, help=description, description=description)
        sub.add_argument("--name", default=DEFAULT_NAME, help="name of the cluster (default: %(default)s)")
        if command == "load-image":
            sub.add_argument("image", help="a name in this tool's storage, or a source of buildah: oci-archive:FILE")
        if command in ("build", "up"):
            choices = sorted(gobuild.MODULES_OF_PROFILE)
            sub.add_argument("--profile", choices=choices, default="full", help="default: %(default)s")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.command == "build":
        gobuild.build(options.profile)
    elif options.command == "up":
        print(up(options.profile, options.name).kubeconfig)
    elif options.command == "down":
        down(options.name)
    elif options.command == "status":
        return _status(options.name)
    elif options.command == "kubeconfig":
        print(_running(options.name).kubeconfig)
    elif options.command == "gguf-tools":
        print(gguftools.build().folder)
    elif options.command == "images":
        _images(options.name)
    elif options.command == "load-image":
        print(images.load(options.image, _registry(_running(options.name))))
    return 0


def _running(name: str) -> Cluster:
    cluster = find(name)
    if cluster is None:
        raise ValueError(f"no cluster {name!r} runs: start it with `python -m tests.cluster up --name {name}`")
    return cluster


def _registry(cluster: Cluster) -> str:
    if cluster.registry is None:
        raise ValueError(f"cluster {cluster.name!r} has no registry: its profile {cluster.profile} runs no pods")
    return cluster.registry


def _images(name: str) -> None:
    cluster = find(name)
    for build in (images.build_operator_image, images.build_trainer_image):
        image = build()
        print(images.push(image, cluster.registry) if cluster is not None and cluster.registry else image)


def _status(name: str) -> int:
    """Prints the cluster and its processes; returns 0 if it is healthy, 1 if not."""
    cluster = find(name)
    for process in processes.running(paths.cluster(name)):
        print(f"{process.pid:>8}  {process.component}")
    if cluster is None:
        print(f"cluster {name!r} does not run, or not completely")
        return 1
    print(f"cluster {name!r} ({cluster.profile}): KUBECONFIG={cluster.kubeconfig}")
    if cluster.registry:
        print(f"registry {cluster.registry}")
    if cluster.s3:
        print(f"S3 {cluster.s3.endpoint} access key {cluster.s3.access_key} secret key {cluster.s3.secret_key}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
