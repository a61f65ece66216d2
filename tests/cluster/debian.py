"""Debian packages that the cluster needs besides what it builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

LOCK_SECONDS = 600
"""How long an installation waits for another one: images and tools are built side by side."""


def require(*packages: str) -> None:
    """Makes sure that `packages` are installed; installs the missing ones when run by root on Debian or Ubuntu.

    Raises:
        RuntimeError: packages are missing and cannot be installed here; the message names them.
    """
    missing = [package for package in packages if not _installed(package)]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(
            f"missing system packages (Debian names): {' '.join(missing)}; install them, for instance with"
            f" `sudo apt-get install {' '.join(missing)}`"
        )
    print(f"installing Debian packages: {' '.join(missing)}", file=sys.stderr, flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "-qq", "update"],
        ["apt-get", "-qq", "-o", f"DPkg::Lock::Timeout={LOCK_SECONDS}", "install", "--no-install-recommends", *missing],
    ):
        result = subprocess.run(command, env=quiet, capture_output=True, text=True)
        # A stale source of somebody else's makes `update` fail although the packages are there: only `install` decides.
        if result.returncode != 0 and "install" in command:
            raise RuntimeError(f"`{' '.join(command)}` failed:\n{result.stderr[-2000:]}")


def _installed(package: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    return subprocess.run(query, capture_output=True, text=True).stdout == "installed"
