"""Builds the GGUF tools of the trainer image once, for the tests and for the image.

Their source is the sdist of llama-cpp-python, pinned in constraints.txt: it carries the sources of llama.cpp, which
has no release of its own in a registry. A cold build takes 4 minutes on 2 cores.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import debian, paths

RECIPE = paths.REPOSITORY / "trainer_image/gguf"
"""CMakeLists.txt, the program and build.sh."""
PACKAGE = "llama-cpp-python"


@dataclass(frozen=True)
class GgufTools:
    """What was built."""

    folder: Path
    """What the trainer image has at /opt/llama.cpp."""
    binding: Path
    """A folder for PYTHONPATH with llama-cpp-python itself, which loads libraries from LLAMA_CPP_LIB_PATH."""

    @property
    def libraries(self) -> Path:
        """The folder for LLAMA_CPP_LIB_PATH."""
        return self.folder / "bin"


def build() -> GgufTools:
    """Returns the tools, built if they are not there; two processes that need them at once build them once.

    Raises:
        RuntimeError: a system package is missing, or the download or the build failed; the message carries the end of
            its output.
    """
    parent = paths.cache() / "gguf-tools"
    folder = parent / _key()
    if not folder.is_dir():
        with paths.locked(parent / ".lock"):
            if not folder.is_dir():
                _build(folder)
    return GgufTools(folder / "tools", folder / "binding")


def requirement() -> str:
    """Returns the pin, as in `llama-cpp-python==0.3.36`."""
    lines = (paths.REPOSITORY / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{PACKAGE}=="))


def _key() -> str:
    digest = hashlib.sha256(requirement().encode())
    for file in sorted(RECIPE.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _build(folder: Path) -> None:
    debian.require("cmake", "g++", "ninja-build")
    started = time.monotonic()
    print(f"building the GGUF tools from {requirement()} (some minutes)", file=sys.stderr, flush=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    download = ["download", "--quiet", "--no-deps", "--no-binary", PACKAGE, "--dest", str(unfinished)]
    _run([sys.executable, "-m", "pip", *download, requirement()])
    (archive,) = unfinished.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(unfinished / "unpacked", filter="data")
    (source,) = (unfinished / "unpacked").iterdir()
    _run([str(RECIPE / "build.sh"), str(source), str(unfinished / "tools")])
    shutil.copytree(source / "llama_cpp", unfinished / "binding/llama_cpp")
    shutil.rmtree(unfinished / "unpacked")
    archive.unlink()
    unfinished.rename(folder)
    print(f"built the GGUF tools in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, env={**os.environ, "LC_ALL": "C.UTF-8"}, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{(result.stdout + result.stderr)[-4000:]}")
