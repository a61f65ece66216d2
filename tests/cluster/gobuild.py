"""Builds the programs of a cluster from their Go modules, or takes prebuilt ones.

Nothing is downloaded but Go modules, whose checksums are committed (go.sum), so a checkout always runs the same
Kubernetes. A cold build of everything takes 13 minutes on 2 cores; after that it is a look-up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import debian, paths

# kubectl cannot parse the version of a server that was built without these.
_KUBERNETES = "1.36.3"
_VERSION = "k8s.io/component-base/version"
_KUBERNETES_LDFLAGS = (
    f"-s -w -X {_VERSION}.gitVersion=v{_KUBERNETES}"
    f" -X {_VERSION}.gitMajor={_KUBERNETES.split('.')[0]} -X {_VERSION}.gitMinor={_KUBERNETES.split('.')[1]}"
)


@dataclass(frozen=True)
class Module:
    """One go.mod under binaries/ and what to build from it."""

    name: str
    programs: tuple[str, ...]
    """File names after the build."""
    package: str = "tool"
    """`tool` is every tool directive of the go.mod; `.` is the module's own main package."""
    tags: str = ""
    ldflags: str = "-s -w"
    cgo: bool = True
    renamed: tuple[tuple[str, str], ...] = ()
    """(name that go gives, name wanted): go names a binary after the last part of its package path."""
    debian_packages: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Returns the flags of `go build`.

        -trimpath and -buildvcs=false keep the checkout's place and commit out of the result, so that Go's build cache
        answers whoever builds.
        """
        flags = ["-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", self.ldflags]
        return [*flags, *(["-tags", self.tags] if self.tags else [])]

    def key(self) -> str:
        """Returns a name of everything the result depends on besides the Go release."""
        digest = hashlib.sha256("\0".join([*self.arguments(), self.package, str(self.cgo)]).encode())
        for file in sorted((paths.MODULES / self.name).iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:16]


KUBERNETES = Module(
    "kubernetes",
    ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl"),
    ldflags=_KUBERNETES_LDFLAGS,
)
ETCD = Module("etcd", ("etcd",), renamed=(("server", "etcd"),))
HELM = Module("helm", ("helm",))
CONTAINERD = Module("containerd", ("containerd", "containerd-shim-runc-v2", "ctr"), tags="no_btrfs,no_zfs,no_devmapper")
RUNC = Module("runc", ("runc",), tags="seccomp", debian_packages=("libseccomp-dev", "pkg-config", "gcc"))
REGISTRY = Module("registry", ("registry",))
COREDNS = Module("coredns", ("coredns",), package=".", cgo=False)
PAUSE = Module("pause", ("pause",), package=".", cgo=False)

MODULES_OF_PROFILE = {
    "control-plane": (KUBERNETES, ETCD, HELM),
    "full": (KUBERNETES, ETCD, HELM, CONTAINERD, RUNC, REGISTRY, COREDNS, PAUSE),
}


def build(profile: str) -> dict[str, Path]:
    """Returns the path of every program that `profile` needs, built where they are missing.

    `TUNEWRIGHT_KUBE_ASSETS` names a folder with prebuilt programs; then nothing is built.

    Raises:
        FileNotFoundError: that folder lacks a program, or Go is not installed.
        RuntimeError: a build failed; the message carries the end of its output.
    """
    modules = MODULES_OF_PROFILE[profile]
    prebuilt = os.environ.get("TUNEWRIGHT_KUBE_ASSETS")
    if prebuilt:
        return _prebuilt(Path(prebuilt), modules)
    found = {}
    for module in modules:
        folder = _built(module)
        found.update({program: folder / program for program in module.programs})
    return found


def _prebuilt(folder: Path, modules: tuple[Module, ...]) -> dict[str, Path]:
    programs = {program: folder.resolve() / program for module in modules for program in module.programs}
    missing = sorted(program for program, path in programs.items() if not path.is_file())
    if missing:
        raise FileNotFoundError(
            f"TUNEWRIGHT_KUBE_ASSETS={folder} lacks {', '.join(missing)}:"
            " add them, or unset the variable to build all from source"
        )
    return programs


def _built(module: Module) -> Path:
    """Returns the folder with the module's programs; two processes that need it at once build it once."""
    parent = paths.cache() / "binaries"
    folder = parent / f"{module.name}-{module.key()}"
    if folder.is_dir():
        return folder
    parent.mkdir(exist_ok=True)
    with paths.locked(parent / f"{module.name}.lock"):
        if not folder.is_dir():
            _go_build(module, folder)
    return folder


def _go_build(module: Module, folder: Path) -> None:
    if shutil.which("go") is None:
        raise FileNotFoundError(
            "no `go` on PATH: install Go 1.26 or later, or point TUNEWRIGHT_KUBE_ASSETS at prebuilt programs"
        )
    debian.require(*module.debian_packages)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    log = folder.with_name(f"{module.name}.log")
    command = ["go", "build", *module.arguments(), "-o", f"{unfinished}/", module.package]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=paths.MODULES / module.name,
            env={**os.environ, "CGO_ENABLED": "1" if module.cgo else "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _show_progress(process, module)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"go build of {module.name} failed; end of {log}:\n{log.read_text()[-3000:]}")
    for given, wanted in module.renamed:
        (unfinished / given).rename(unfinished / wanted)
    unfinished.rename(folder)


def _show_progress(process: subprocess.Popen[bytes], module: Module) -> None:
    """Waits for a build and says every ten seconds that it still runs, since the first one takes minutes."""
    started = time.monotonic()
    print(f"building {module.name} ({', '.join(module.programs)})", file=sys.stderr, flush=True)
    while True:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            print(f"building {module.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        else:
            print(f"built {module.name} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            return
