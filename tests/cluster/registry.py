"""An image registry on the host side of the full profile's network; plain HTTP, on an address only this machine has."""

from __future__ import annotations

from pathlib import Path

import httpx
import yaml

from tests.cluster import paths, processes

PORT = 5000


def start(program: Path, folder: Path, address: str) -> str:
    """Starts the registry for the cluster in `folder`; returns its address with port.

    Its images lie in the cache and survive the cluster: pushing the trainer image again would cost a minute.

    Raises:
        RuntimeError: it did not start; the message carries the end of its log.
    """
    configuration = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {
            "filesystem": {"rootdirectory": str(paths.cache() / "registry")},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"{address}:{PORT}"},
    }
    file = folder / "registry.yaml"
    file.write_text(yaml.safe_dump(configuration))
    # Without this it reports traces to a collector that does not exist.
    environment = {"OTEL_TRACES_EXPORTER": "none"}
    processes.start("registry", [str(program), "serve", str(file)], folder, environment=environment)
    processes.wait_until(lambda: _answers(f"http://{address}:{PORT}/v2/"), folder, "registry")
    return f"{address}:{PORT}"


def has(registry: str, repository: str, tag: str) -> bool:
    """Tells whether `registry` holds `repository:tag`."""
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    url = f"http://{registry}/v2/{repository}/manifests/{tag}"
    return httpx.head(url, headers={"Accept": accept}, trust_env=False).status_code == 200


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
