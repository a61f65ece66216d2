"""Finds and removes what is mounted under a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path


def under(folder: Path) -> list[Path]:
    """Returns the mount points in `folder`, the last mounted first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # The kernel writes a space in a path as \040.
        point = Path(line.split(" ")[4].replace("\\040", " "))
        if point.is_relative_to(folder):
            found.append(point)
    return found[::-1]


def remove(folder: Path) -> None:
    """Unmounts everything in `folder`, which a `rmtree` would otherwise follow.

    Raises:
        RuntimeError: something stays mounted; the message names it.
    """
    for point in under(folder):
        # Lazy: a process that still ends may hold it for a moment.
        subprocess.run(["umount", "--lazy", str(point)], capture_output=True)
    if left := under(folder):
        raise RuntimeError(f"cannot unmount {', '.join(map(str, left))}: end what uses it, then try again")
