"""Builds the project's images without Docker and pushes them to a cluster's registry.

An image's tag is a digest of everything that goes into it: building one that is there already is a look-up, and a pod
that names the tag can only run that content.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import debian, gguftools, paths, registry

BASE_IMAGE = "localhost/debian-python:bookworm"
"""Debian 12 with its Python 3.11, the counterpart of python:3.12-slim where no registry of images can be reached."""

_DEBIAN = "bookworm"
_BASE_PACKAGES = "python3,python3-venv,ca-certificates"

# What both Dockerfiles copy; .dockerignore lets the same through.
_INPUTS = (
    *("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "operator"),
    *("trainer_image/tunewright_trainer", "trainer_image/gguf"),
)

_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
"""Debian's bundle of certificate authorities; its place in the base image."""


def build_operator_image() -> str:
    """Returns the name of the operator image for the code as it is, built if it is not there.

    Raises:
        RuntimeError: a system package is missing or the build failed; the message carries the end of its output.
    """
    return _build("tunewright-operator", "Dockerfile")


def build_trainer_image() -> str:
    """Returns the name of the trainer image for the code as it is, built if it is not there.

    The first build takes some minutes and 6 GB for PyTorch; later ones reuse that layer while the pins are the same.
    The GGUF tools are compiled outside of it, once for the image and the tests.

    Raises:
        RuntimeError: a system package is missing or the build failed; the message carries the end of its output.
    """
    tools = gguftools.build()
    return _build("tunewright-trainer", "trainer_image/Dockerfile", f"--volume={tools.folder}:/prebuilt:ro")


def content_tag(dockerfile: str) -> str:
    """Returns the tag of an image for the code as it is: a digest of everything that goes into it."""
    with paths.locked(paths.cache() / "images.lock"):
        return _digest(_copy_inputs(dockerfile))


def build_pause_image(program: Path) -> str:
    """Returns the name of an image with nothing but `program`, which holds a pod's namespaces."""
    image = f"localhost/tunewright-pause:{hashlib.sha256(program.read_bytes()).hexdigest()[:16]}"
    # Asked without the lock first: else a cluster could not start while the trainer image is built.
    if not _exists(image):
        with paths.locked(paths.cache() / "images.lock"):
            _commit(program, image, "/pause", "--entrypoint", '["/pause"]', "--user", "65535:65535")
    return image


def push(image: str, address: str) -> str:
    """Pushes a local `image` to the registry at `address`; returns its name there.

    Nothing is pushed if the registry has that tag: tags are digests of the content.

    Raises:
        RuntimeError: the push failed.
    """
    repository, tag = image.removeprefix("localhost/").rsplit(":", 1)
    remote = f"{address}/{repository}:{tag}"
    if not registry.has(address, repository, tag):
        started = time.monotonic()
        # Uncompressed: on one machine compressing 6 GB takes minutes and saves nothing but disk.
        _buildah("push", "--quiet", "--disable-compression", "--tls-verify=false", image, f"docker://{remote}")
        print(f"pushed {remote} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return remote


def load(image: str, address: str) -> str:
    """Pushes any `image` that buildah can read, such as `oci-archive:FILE`, to the registry; returns its name there.

    Raises:
        RuntimeError: it cannot be read or the push failed.
    """
    # An image without transport is one of this tool's own.
    local = image if image.startswith("localhost/") else _buildah("pull", "--quiet", image).strip()
    # The name of an archive says nothing; its content's identifier does.
    name = image if image.startswith("localhost/") else f"loaded:{local.removeprefix('sha256:')[:16]}"
    remote = f"{address}/{name.removeprefix('localhost/')}"
    _buildah("push", "--quiet", "--disable-compression", "--tls-verify=false", local, f"docker://{remote}")
    return remote


def _build(name: str, dockerfile: str, *mounts: str) -> str:
    with paths.locked(paths.cache() / "images.lock"):
        # A copy, so that the tag is true even when somebody edits a file during the build.
        context = _copy_inputs(dockerfile)
        image = f"localhost/{name}:{_digest(context)}"
        if _exists(image):
            return image
        # What a build that was killed has left; all containers in this storage are ours, and no other build runs.
        _buildah("rm", "--all")
        shutil.rmtree(_scratch())
        _ensure_base_image()
        started = time.monotonic()
        print(f"building {image}", file=sys.stderr, flush=True)
        arguments = [
            f"--build-arg=BASE_IMAGE={BASE_IMAGE}",
            "--build-arg=UV_NO_CACHE=0",
            *_build_mounts(),
            *mounts,
            f"--file={context / dockerfile}",
            f"--tag={image}",
        ]
        _buildah("build", "--quiet", "--layers", "--pull-never", *arguments, str(context))
        _remove_older(name, image)
        print(f"built {image} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return image


def _copy_inputs(dockerfile: str) -> Path:
    context = _storage() / "context"
    shutil.rmtree(context, ignore_errors=True)
    for name in (dockerfile, *_INPUTS):
        source, target = paths.REPOSITORY / name, context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy2(source, target)
    return context


def _build_mounts() -> list[str]:
    """Returns what a build gets from this machine: trusted authorities, and uv's cache for speed."""
    authorities = os.environ.get("SSL_CERT_FILE", _AUTHORITIES)
    settings = _storage() / "settings"
    settings.mkdir(exist_ok=True)
    # By default both bring their own list of authorities, and ignore a company's.
    (settings / "pip.conf").write_text(f"[global]\ncert = {_AUTHORITIES}\n")
    (settings / "uv.toml").write_text("system-certs = true\n")
    uv_cache = Path(os.environ.get("UV_CACHE_DIR", Path.home() / ".cache" / "uv"))
    uv_cache.mkdir(parents=True, exist_ok=True)
    return [
        f"--volume={authorities}:{_AUTHORITIES}:ro",
        f"--volume={settings / 'pip.conf'}:/etc/pip.conf:ro",
        f"--volume={settings / 'uv.toml'}:/etc/uv/uv.toml:ro",
        f"--volume={uv_cache}:/root/.cache/uv",
    ]


def _digest(context: Path) -> str:
    """Returns a digest of all that goes into the image: contents and names, not times."""
    digest = hashlib.sha256(BASE_IMAGE.encode())
    for file in sorted(context.rglob("*")):
        if file.is_file():
            digest.update(str(file.relative_to(context)).encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _ensure_base_image() -> None:
    if _exists(BASE_IMAGE):
        return
    debian.require("debootstrap")
    print(f"building {BASE_IMAGE} (about a minute)", file=sys.stderr, flush=True)
    root = _storage() / "debian"
    shutil.rmtree(root, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _DEBIAN, str(root), _mirror()]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{(result.stdout + result.stderr)[-2000:]}")
    # `python` and not only `python3`, as in the official Python images.
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    for packages in (root / "var/cache/apt/archives").glob("*.deb"):
        packages.unlink()
    _commit(root, BASE_IMAGE, "/", "--cmd", "python3")
    shutil.rmtree(root)


def _mirror() -> str:
    """Returns where this machine itself gets Debian's packages from.

    Raises:
        RuntimeError: apt knows no such place.
    """
    command = ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        release, address = line.split()
        if release == _DEBIAN:
            return address
    raise RuntimeError(
        f"apt has no source of Debian {_DEBIAN}, which the base image is made of: add one to sources.list"
    )


def _commit(source: Path, image: str, place: str, *settings: str) -> None:
    """Makes an image of one file or folder."""
    container = _buildah("from", "scratch").strip()
    _buildah("add", "--quiet", container, str(source), place)
    _buildah("config", *settings, container)
    _buildah("commit", "--quiet", "--rm", container, image)


def _remove_older(name: str, newest: str) -> None:
    """Removes earlier images of `name`; their shared layers stay, as the newest one uses them."""
    listed = _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()
    older = [image for image in listed if image.startswith(f"localhost/{name}:") and image != newest]
    if older:
        _buildah("rmi", *older)


def _exists(image: str) -> bool:
    return _run_buildah("inspect", "--type=image", "--format={{.FromImageID}}", image).returncode == 0


def _buildah(*arguments: str) -> str:
    result = _run_buildah(*arguments)
    if result.returncode != 0:
        output = (result.stdout + result.stderr)[-4000:]
        raise RuntimeError(f"`buildah {' '.join(arguments)}` failed:\n{output}")
    return result.stdout


def _run_buildah(*arguments: str) -> subprocess.CompletedProcess[str]:
    if platform.system() != "Linux":
        raise RuntimeError("images are built with buildah, which needs Linux; use `docker build` here")
    debian.require("buildah")
    storage = _storage()
    # Own storage: nobody's images are touched, and removing the cache folder removes everything.
    # A mount namespace of its own, so that no mount is left on the machine, even by a build that is killed.
    isolated = ["unshare", "--mount", "--propagation=private"] if os.geteuid() == 0 else []
    command = [*isolated, "buildah", f"--root={storage / 'storage'}", f"--runroot={storage / 'run'}", *arguments]
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(_scratch())}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _scratch() -> Path:
    """Returns where buildah unpacks; what a killed build left there, gigabytes at times, `_build` removes."""
    folder = _storage() / "scratch"
    folder.mkdir(exist_ok=True)
    return folder


def _storage() -> Path:
    folder = paths.cache() / "images"
    folder.mkdir(exist_ok=True)
    return folder
