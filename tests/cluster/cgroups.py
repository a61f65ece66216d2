"""The control group in which all pods of the full profile live, so that they can be found and removed."""

from __future__ import annotations

import os
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


def create(name: str) -> None:
    """Makes the group `name` in every hierarchy; works with cgroup v2, v1 and both at once."""
    for parent in _hierarchies():
        group = parent / name
        if (parent / "cgroup.controllers").exists() and parent == _MOUNT:
            # A child gets only the controllers that its parent hands down.
            controllers = (parent / "cgroup.controllers").read_text().split()
            (parent / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in controllers))
        group.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):
            # In cgroup v1 these start empty, and nothing can run in a group without CPUs.
            if (parent / "cpuset.cpu_exclusive").exists():
                (group / setting).write_text((parent / setting).read_text())


def remove(name: str) -> None:
    """Removes the group `name`, if it exists; all processes in them must have ended."""
    for parent in _hierarchies():
        for directory, _, _ in os.walk(parent / name, topdown=False):
            Path(directory).rmdir()


def _hierarchies() -> list[Path]:
    if (_MOUNT / "cgroup.controllers").exists():
        return [_MOUNT]
    return sorted({folder.resolve() for folder in _MOUNT.iterdir() if (folder / "cgroup.procs").exists()})
