"""Where the embedded cluster keeps its files.

Everything lies in one folder of the user's cache, so that `rm -r` of that folder is a complete clean-up once no cluster
runs:

    binaries/         what `go build` made, one folder per module, keyed by its pins
    clusters/NAME/    one running cluster: certificates, logs, sockets, mounts; deleted by `down`
    containerd/NAME/  unpacked images; kept, because unpacking the trainer image again costs a minute
    registry/         pushed images; kept for the same reason
    images/           buildah's storage and the Debian base folder
    models/           converted models
    gguf-tools/       what llama.cpp's sources made, keyed by their pin and the recipe
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
"""Root of the checkout: build context of both images."""

MODULES = Path(__file__).resolve().parent / "binaries"
"""One folder with go.mod and go.sum per group of binaries."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")


def cache() -> Path:
    """Returns the cache folder, made if missing.

    `TUNEWRIGHT_CACHE` overrides it (CI keeps it on a fast disk); otherwise it follows the XDG rule, because everything
    in it can be made again.
    """
    chosen = os.environ.get("TUNEWRIGHT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(chosen) if chosen else Path(base) / "tunewright"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def containerd(folder: Path) -> Path:
    """Returns where containerd of the cluster in `folder` keeps its images."""
    return folder.parents[1] / "containerd" / folder.name


def cluster(name: str) -> Path:
    """Returns the folder of cluster `name`, which need not exist.

    Raises:
        ValueError: `name` is not a DNS label of at most 40 characters; it becomes part of socket paths, which Linux
            limits to 107 bytes.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"cluster name {name!r}: use at most 40 lower-case letters, digits and inner hyphens")
    return cache() / "clusters" / name


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path` between processes; the kernel drops it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
