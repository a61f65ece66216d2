"""A control plane, the operator as a process under its own account, and the kubelet's part played by the test."""

from __future__ import annotations

import base64
import copy
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests import cluster as clusters
from tests.cluster import Cluster, ports
from tests.integration.proxy import Proxy
from tests.operator_process import grant, kubeconfig_of

Document = dict[str, Any]

GROUP = "/apis/tunewright.dev/v1alpha1"

# Seconds, so that tests do not wait: what is a minute for people is a moment here.
QUICK = {
    "TUNEWRIGHT_BACKOFF_SECONDS": "1",
    "TUNEWRIGHT_CONFIG_ERROR_GRACE_SECONDS": "2",
    "TUNEWRIGHT_IMAGE_PULL_GRACE_SECONDS": "4",
    "TUNEWRIGHT_NODE_LOST_GRACE_SECONDS": "2",
    "TUNEWRIGHT_RESYNC_SECONDS": "20",
}


def finetunejob(name: str, **changes: Any) -> Document:
    """Return a valid FineTuneJob; `changes` replace parts of its spec."""
    spec: Document = {
        "model": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://datasets/train.jsonl"}]},
        "method": {"type": "LoRA"},
        "output": {"uri": f"s3://models/{name}"},
        "storage": {"secretName": "s3-credentials"},
    }
    spec.update(copy.deepcopy(changes))
    return {"apiVersion": "tunewright.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}


def adaptermerge(name: str, **changes: Any) -> Document:
    """Return a valid AdapterMerge; `changes` replace parts of its spec."""
    spec: Document = {
        "adapters": [{"uri": "s3://models/adapter"}],
        "output": {"uri": f"s3://models/{name}"},
        "storage": {"secretName": "s3-credentials"},
    }
    spec.update(copy.deepcopy(changes))
    return {"apiVersion": "tunewright.dev/v1alpha1", "kind": "AdapterMerge", "metadata": {"name": name}, "spec": spec}


def wait(condition: Callable[[], Any], what: str, limit: float = 40) -> Any:
    """Poll until `condition()` is true and return its value."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {limit} s"
        time.sleep(0.1)


def tls_of(kubeconfig: Path) -> tuple[str, ssl.SSLContext]:
    """Return the address of a cluster and the TLS settings of its administrator."""
    document = yaml.safe_load(kubeconfig.read_text())
    server, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(server["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile() as file:
        for key in ("client-certificate-data", "client-key-data"):
            file.write(base64.b64decode(user[key]))
        file.flush()
        context.load_cert_chain(file.name)
    return server["server"], context


class Api:
    """The API server, for an administrator, in one namespace; names without a kind are of `workloads`."""

    def __init__(self, client: httpx.Client, namespace: str, workloads: str = "finetunejobs") -> None:
        self.client = client
        self.namespace = namespace
        self.workloads = workloads

    @property
    def merges(self) -> Api:
        """The same, with names of AdapterMerges."""
        return Api(self.client, self.namespace, "adaptermerges")

    def call(self, method: str, path: str, document: Document | None = None, **options: Any) -> Document:
        """Make a request that must succeed."""
        response = self.client.request(method, path, json=document, **options)
        assert response.status_code < 400, response.text
        answer: Document = response.json()
        return answer

    def path(self, kind: str, name: str = "") -> str:
        """Return the path of an object or of all objects of a kind."""
        group = {"finetunejobs": GROUP, "adaptermerges": GROUP, "jobs": "/apis/batch/v1"}.get(kind, "/api/v1")
        return f"{group}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def create(self, document: Document) -> Document:
        """Create a FineTuneJob or an AdapterMerge."""
        path = self.path(f"{document['kind'].lower()}s")
        return self.call("POST", path, document, params={"fieldValidation": "Strict"})

    def get(self, kind: str, name: str) -> Document | None:
        """Return an object, None when it is not there."""
        response = self.client.get(self.path(kind, name))
        if response.status_code == 404:
            return None
        assert response.status_code == 200, response.text
        answer: Document = response.json()
        return answer

    def items(self, kind: str, selector: str = "") -> list[Document]:
        """Return all objects of a kind."""
        found: list[Document] = self.call("GET", self.path(kind), params={"labelSelector": selector})["items"]
        return found

    def patch(self, kind: str, name: str, document: Document, subresource: str = "") -> Document:
        """Merge a patch into an object."""
        path = self.path(kind, name) + (f"/{subresource}" if subresource else "")
        return self.call("PATCH", path, document, headers={"Content-Type": "application/merge-patch+json"})

    def delete(self, kind: str, name: str, **options: Any) -> None:
        """Delete an object and what it owns."""
        self.call("DELETE", self.path(kind, name), {"propagationPolicy": "Background", **options})

    def end_deletion(self, pod: str) -> None:
        """Remove a pod that is being deleted, as a kubelet does; it may be gone already."""
        response = self.client.request("DELETE", self.path("pods", pod), json={"gracePeriodSeconds": 0})
        assert response.status_code in (200, 404), response.text

    def status(self, name: str) -> Document:
        """Return the status of a workload."""
        document = self.get(self.workloads, name)
        assert document is not None
        found: Document = document.get("status", {})
        return found

    def condition(self, name: str, kind: str) -> Document:
        """Return a condition, empty before the first visit."""
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def reasons(self, name: str) -> list[str]:
        """Return the reasons of the events of a workload, in order."""
        about = (self.workloads.removesuffix("s"), name)
        events = [
            e
            for e in self.items("events")
            if (e["involvedObject"]["kind"].lower(), e["involvedObject"]["name"]) == about
        ]
        return [e["reason"] for e in sorted(events, key=lambda e: e["eventTime"] or "")]

    def until(self, name: str, condition: Callable[[Document], Any], limit: float = 40) -> Document:
        """Wait until a status is as it should be, and return it."""
        try:
            wait(lambda: condition(self.status(name)), name, limit)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {json.dumps(self.status(name), indent=1)}") from None
        return self.status(name)

    def pod(self, name: str, attempt: int = 1, node: int | None = None) -> Document:
        """Wait for the pod of an attempt, or of one of its nodes."""
        selector = f"tunewright.dev/{self.workloads.removesuffix('s')}={name},tunewright.dev/attempt={attempt}"
        if node is not None:
            selector += f",batch.kubernetes.io/job-completion-index={node}"
        found: Document = wait(lambda: self.items("pods", selector), f"pod of {name}, attempt {attempt}")[0]
        return found

    def bind(self, pod: Document) -> None:
        """Give a pod a node, which does not exist: once deleted, it waits for a kubelet like any pod that runs."""
        binding = {"metadata": {"name": pod["metadata"]["name"]}, "target": {"kind": "Node", "name": "node1"}}
        self.call("POST", f"{self.path('pods', pod['metadata']['name'])}/binding", binding)

    def play_kubelet(self, pod: Document, **status: Any) -> None:
        """Report a pod's state as a kubelet would."""
        self.patch("pods", pod["metadata"]["name"], {"status": status}, "status")

    def end_pod(
        self,
        pod: Document,
        exit_code: int,
        message: str = "",
        ended_as: str = "Error",
        at: str = "2026-01-01T00:01:00Z",
        **status: Any,
    ) -> None:
        """Report the end of a pod's container; `status` is the pod's own."""
        ended = {
            "exitCode": exit_code,
            "reason": ended_as,
            "message": message,
            "startedAt": "2026-01-01T00:00:00Z",
            "finishedAt": at,
        }
        phase = "Failed" if exit_code else "Succeeded"
        self.play_kubelet(pod, phase=phase, containerStatuses=[container(terminated=ended)], **status)


def container(**state: Any) -> Document:
    """Return the trainer's entry of containerStatuses."""
    ready = "running" in state
    return {"name": "trainer", "image": "x", "imageID": "x", "ready": ready, "restartCount": 0, "state": state}


class Operator:
    """The operator's process; `environment` is added to its settings."""

    def __init__(self, kubeconfig: Path, log: Path) -> None:
        self._kubeconfig = kubeconfig
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self, **environment: str) -> None:
        """Start it and wait until it is ready."""
        self.port = ports.free(1)[0]
        variables = {**os.environ, **QUICK, **environment, "KUBECONFIG": str(self._kubeconfig)}
        variables["TUNEWRIGHT_PORT"] = str(self.port)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunewright_operator"], env=variables, stdout=log, stderr=log
            )
        wait(self._is_ready, "the operator's first list", 60)

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text()[-3000:]
        try:
            return self.get("/readyz") == "ok"
        except OSError:
            return False

    def get(self, path: str) -> str:
        """Return what the operator's own server says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as response:
            answer: str = response.read().decode()
        return answer

    def log(self) -> list[Document]:
        """Return the log's lines."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def kill(self) -> None:
        """End it without giving it time for anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> int:
        """End it in order and return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.process = None
        return code


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Give a control plane with the CRD and the operator's account, one per process: none ends another's."""
    name = f"integration-{os.getpid()}"
    try:
        running = clusters.up("control-plane", name=name)
        grant(running)
        yield running
    finally:
        clusters.down(name)


@pytest.fixture(scope="session")
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    """Give an HTTP client with the administrator's certificate."""
    server, tls = tls_of(cluster.kubeconfig)
    with httpx.Client(base_url=server, verify=tls, timeout=30, trust_env=False) as opened:
        yield opened


@pytest.fixture(scope="session")
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """Give the proxy that all operators of the session go through."""
    document = yaml.safe_load(cluster.kubeconfig.read_text())
    server = document["clusters"][0]["cluster"]
    # No client certificate: the API server sees the operator's own token.
    tls = ssl.create_default_context(cadata=base64.b64decode(server["certificate-authority-data"]).decode())
    between = Proxy(server["server"], tls)
    between.start()
    yield between
    between.stop()


@pytest.fixture(scope="session")
def process(cluster: Cluster, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """Give the operator, not started."""
    folder = tmp_path_factory.mktemp("operator")
    return Operator(kubeconfig_of(cluster, folder, proxy.address), folder / "operator.log")


@pytest.fixture
def operator(process: Operator, proxy: Proxy) -> Operator:
    """Give the running operator; it stays for the next test."""
    proxy.refuse = lambda _: None
    if process.process is None:
        process.start()
    assert process.process is not None
    assert process.process.poll() is None, "the operator has ended; see its log"
    return process


@pytest.fixture(scope="session", autouse=True)
def _end(process: Operator) -> Iterator[None]:
    """End the operator before its cluster."""
    yield
    if process.process is not None:
        process.kill()


_numbers = iter(range(1, 10_000))


@pytest.fixture
def api(client: httpx.Client) -> Api:
    """Give an empty namespace that enforces the restricted Pod Security Standard."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    return add_namespace(client, name)


def add_namespace(client: httpx.Client, name: str) -> Api:
    """Create a namespace that enforces the restricted Pod Security Standard."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    found = Api(client, name)
    found.call("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    wait(lambda: found.get("serviceaccounts", "default"), "default service account")
    return found
