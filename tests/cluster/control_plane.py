"""Starts etcd, the API server and the controller manager (and the scheduler where there is a node)."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import ports, processes
from tests.cluster.certificates import Authority

SERVICE_NETWORK = "10.96.0.0/16"
_KUBERNETES_SERVICE = "10.96.0.1"


@dataclass(frozen=True)
class ControlPlane:
    """What is needed to start the control plane of one cluster."""

    folder: Path
    programs: dict[str, Path]
    address: str
    """Where the API server listens: loopback without a node, the namespace's address with one."""
    port: int
    pods: str = "10.244.0.0/24"
    """Addresses of the node's pods."""
    namespace: str | None = None
    """Network namespace, None for the machine's own."""

    @property
    def server(self) -> str:
        """Address of the API server."""
        return f"https://{self.address}:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.folder / "admin.kubeconfig"

    def kubectl(self, *arguments: str, document: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as the administrator, with `document` as its input; the caller looks at the return code."""
        command = [str(self.programs["kubectl"]), f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(command, input=document, capture_output=True, text=True)

    def start(self, authority: Authority) -> None:
        """Starts everything and waits until a pod could be created.

        Raises:
            RuntimeError: a component ended or is not ready in time; the message names its log.
        """
        service_account_public, service_account_private = authority.service_account_keys()
        etcd = self._start_etcd()
        self._start_api_server(authority, etcd, service_account_public, service_account_private)
        authority.kubeconfig(self.kubeconfig, self.server, "admin", "system:masters")
        processes.wait_until(lambda: self._answers("/readyz"), self.folder, "kube-apiserver")
        # Not earlier: the roles of these two are made while the API server starts, and they end when refused.
        self._start_controller_manager(authority, service_account_private)
        if self.namespace is not None:
            self._start_scheduler(authority)
        # Without its namespace's `default` account a pod is refused; the controller manager makes it.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        processes.wait_until(lambda: self._answers(account), self.folder, "kube-controller-manager")

    def _answers(self, path: str) -> bool:
        return self.kubectl("get", "--raw", path).returncode == 0

    def _run(self, component: str, *arguments: str) -> None:
        command = [str(self.programs[component]), *arguments]
        processes.start(component, command, self.folder, namespace=self.namespace)

    def _start_etcd(self) -> str:
        client_port, peer_port = ports.free(2)
        client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
        self._run(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            # Nothing here has to outlive a power cut, and it makes every write several times faster.
            "--unsafe-no-fsync",
        )
        return client

    def _start_api_server(self, authority: Authority, etcd: str, public: Path, private: Path) -> None:
        names = (
            self.address,
            "127.0.0.1",
            _KUBERNETES_SERVICE,
            "localhost",
            "kubernetes",
            "kubernetes.default.svc",
        )
        certificate, key = authority.issue("kube-apiserver", "kube-apiserver", addresses=names)
        # `kubectl logs` and `exec` are calls of the API server to the kubelet, which wants to know who asks.
        kubelet_certificate, kubelet_key = authority.issue("kubelet-client", "kube-apiserver", "system:masters")
        # A loopback address cannot be an endpoint of the `kubernetes` Service; without nodes nobody uses it.
        reconciler = ["--endpoint-reconciler-type=none"] if self.namespace is None else []
        self._run(
            "kube-apiserver",
            f"--etcd-servers={etcd}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={self.port}",
            *reconciler,
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged",
            f"--client-ca-file={authority.certificate}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--service-account-key-file={public}",
            f"--service-account-signing-key-file={private}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--kubelet-certificate-authority={authority.certificate}",
            f"--kubelet-client-certificate={kubelet_certificate}",
            f"--kubelet-client-key={kubelet_key}",
            "--kubelet-preferred-address-types=InternalIP",
        )

    def _start_controller_manager(self, authority: Authority, private: Path) -> None:
        file = self.folder / "kube-controller-manager.kubeconfig"
        kubeconfig = authority.kubeconfig(file, self.server, "system:kube-controller-manager")
        self._run(
            "kube-controller-manager",
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--service-account-private-key-file={private}",
            f"--root-ca-file={authority.certificate}",
            "--use-service-account-credentials",
            "--allocate-node-cidrs",
            f"--cluster-cidr={self.pods}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={ports.free(1)[0]}",
            # The default of 20 requests a second would be what a benchmark of the operator measures.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        )

    def _start_scheduler(self, authority: Authority) -> None:
        file = self.folder / "kube-scheduler.kubeconfig"
        kubeconfig = authority.kubeconfig(file, self.server, "system:kube-scheduler")
        self._run(
            "kube-scheduler",
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        )
