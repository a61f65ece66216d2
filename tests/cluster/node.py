"""The node of the full profile: containerd, kubelet and kube-proxy, with a CNI network of the kernel's own means."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster import cgroups, dns, paths, processes
from tests.cluster.certificates import Authority
from tests.cluster.control_plane import ControlPlane
from tests.cluster.network import Network

NODE_NAME = "node1"

_CNI_PLUGINS = "/usr/lib/cni"
"""Where Debian's containernetworking-plugins puts them."""


@dataclass(frozen=True)
class Node:
    """What is needed to start the node of one cluster."""

    plane: ControlPlane
    network: Network
    registry: str
    pause_image: str

    @property
    def folder(self) -> Path:
        """The cluster's folder."""
        return self.plane.folder

    def start_containerd(self) -> None:
        """Starts containerd and removes the containers that an earlier cluster left in its database."""
        self._write_containerd_files()
        self._run_containerd()
        if self._remove_containers():
            # The kubelet's view of containers is read at the start of containerd, not when they are removed.
            processes.stop(self.folder, "containerd")
            self._run_containerd()

    def start(self, authority: Authority) -> None:
        """Starts kubelet and kube-proxy and waits until the node takes pods."""
        cgroups.create(processes.cgroup(self.folder))
        self._start_kubelet(authority)
        self._start_kube_proxy(authority)
        processes.wait_until(self._is_ready, self.folder, "kubelet")

    def _is_ready(self) -> bool:
        wanted = "--for=condition=Ready"
        return self.plane.kubectl("wait", wanted, f"node/{NODE_NAME}", "--timeout=1s").returncode == 0

    def _run(self, component: str, *arguments: str) -> None:
        programs = self.plane.programs
        # containerd looks for its shim, and the shim for runc, on PATH; kubelet and kube-proxy for system tools.
        folders = [programs["containerd"].parent, programs["runc"].parent]
        path = ":".join([*map(str, folders), processes.SYSTEM_PATH])
        processes.start(
            component,
            [str(programs[component]), *arguments],
            self.folder,
            namespace=self.network.name,
            environment={"PATH": path},
        )

    def _run_containerd(self) -> None:
        self._run("containerd", f"--config={self.folder / 'containerd.toml'}")
        processes.wait_until(lambda: self._ctr("version") is not None, self.folder, "containerd")

    def _ctr(self, *arguments: str) -> str | None:
        """Runs containerd's client in the namespace of Kubernetes; returns None where it fails."""
        socket = f"--address={self.network.runtime / 'containerd.sock'}"
        command = [str(self.plane.programs["ctr"]), socket, "--namespace=k8s.io", *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.stdout if result.returncode == 0 else None

    def _remove_containers(self) -> bool:
        """Removes containers, sandboxes and the leases that keep their files; tells whether there were any."""
        containers = (self._ctr("containers", "list", "--quiet") or "").split()
        sandboxes = [line.split()[0] for line in (self._ctr("sandboxes", "list") or "").splitlines()[1:]]
        leases = (self._ctr("leases", "list", "--quiet") or "").split()
        if containers:
            self._ctr("containers", "delete", *containers)
        if sandboxes:
            # --force: their processes are long gone, so they cannot be stopped first.
            self._ctr("sandboxes", "remove", "--force", *sandboxes)
        if leases:
            self._ctr("leases", "delete", *leases)
        return bool(containers or sandboxes or leases)

    def _write_containerd_files(self) -> None:
        folder = self.folder
        hosts = folder / "certs.d" / self.registry
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(f'server = "http://{self.registry}"\n')
        (folder / "cni").mkdir()
        # ptp and not bridge: each pod has its own link, so that the answer of a Service's pod on the same node passes
        # through the kernel's address translation.
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": self.network.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(folder / "cni" / "addresses"),
        }
        plugins = [{"type": "ptp", "ipMasq": False, "mtu": 1500, "ipam": addresses}]
        cni = {"cniVersion": "1.0.0", "name": self.network.name, "plugins": plugins}
        (folder / "cni" / "10-pods.conflist").write_text(json.dumps(cni, indent=1))
        (folder / "containerd.toml").write_text(
            _CONTAINERD.format(
                folder=folder,
                root=paths.containerd(folder),
                sockets=self.network.runtime,
                pause=self.pause_image,
                runc=self.plane.programs["runc"],
                cni_plugins=_CNI_PLUGINS,
            )
        )

    def _start_kubelet(self, authority: Authority) -> None:
        user = f"system:node:{NODE_NAME}"
        kubeconfig = authority.kubeconfig(self.folder / "kubelet.kubeconfig", self.plane.server, user, "system:nodes")
        certificate, key = authority.issue("kubelet-server", user, addresses=(self.network.node, NODE_NAME))
        root = self.folder / "kubelet"
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.network.node,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(authority.certificate)},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "containerRuntimeEndpoint": f"unix://{self.network.runtime / 'containerd.sock'}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{processes.cgroup(self.folder)}",
            "failCgroupV1": False,
            "enforceNodeAllocatable": ["pods"],
            # No swap, or some: it is the developer's machine either way.
            "failSwapOn": False,
            # The machine's disk is not the cluster's: only a disk that is really full may evict or delete images.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 99,
            "imageGCLowThresholdPercent": 98,
            "clusterDNS": [self.network.node],
            "clusterDomain": dns.DOMAIN,
            "podLogsDir": str(self.folder / "pod-logs"),
            "volumePluginDir": str(root / "volume-plugins"),
            # The defaults of 5 and 10 requests a second would make a test of many pods a test of the kubelet.
            "registryPullQPS": 0,
            "eventRecordQPS": 0,
            "serializeImagePulls": False,
        }
        file = self.folder / "kubelet.yaml"
        file.write_text(yaml.safe_dump(configuration))
        self._run(
            "kubelet",
            f"--config={file}",
            f"--kubeconfig={kubeconfig}",
            f"--root-dir={root}",
            f"--hostname-override={NODE_NAME}",
            f"--node-ip={self.network.node}",
        )

    def _start_kube_proxy(self, authority: Authority) -> None:
        kubeconfig = authority.kubeconfig(self.folder / "kube-proxy.kubeconfig", self.plane.server, "system:kube-proxy")
        configuration = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            "clusterCIDR": self.network.pods,
            "hostnameOverride": NODE_NAME,
            # The limit belongs to the whole machine, so a namespace may not set it.
            "conntrack": {"maxPerCore": 0},
        }
        file = self.folder / "kube-proxy.yaml"
        file.write_text(yaml.safe_dump(configuration))
        self._run("kube-proxy", f"--config={file}")


def remove_leftovers(network: Network) -> None:
    """Removes what killed shims and pods leave outside of the cluster's folder."""
    for result in Path("/var/lib/cni/results").glob(f"{network.name}-*"):
        result.unlink()
    if network.runtime.exists():
        shutil.rmtree(network.runtime)


# restrict_oom_score_adj: root without CAP_SYS_RESOURCE (nested machines) may not lower the score of a container.
# discard_unpacked_layers: halves the disk that the images take; the registry still has the layers.
_CONTAINERD = """\
version = 3
root = "{root}"
state = "{folder}/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri"]

[plugins.'io.containerd.server.v1.grpc']
address = "{sockets}/containerd.sock"

[plugins.'io.containerd.server.v1.ttrpc']
address = "{sockets}/containerd.sock.ttrpc"

[plugins.'io.containerd.internal.v1.opt']
path = "{folder}/opt"

[plugins.'io.containerd.shim.v1.manager']
socket_dir = "{sockets}"

[plugins.'io.containerd.cri.v1.images']
discard_unpacked_layers = true

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{pause}"

[plugins.'io.containerd.cri.v1.images'.registry]
config_path = "{folder}/certs.d"

[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{runc}"
Root = "{folder}/runc"
SystemdCgroup = false

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{cni_plugins}"]
conf_dir = "{folder}/cni"
use_internal_loopback = true
"""
