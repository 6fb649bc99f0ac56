"""One real node beside the control plane: containerd, kubelet, kube-proxy, a bridge for its pods, and DNS.

kube-proxy uses nftables, pods reach each other over a bridge, names are answered by CoreDNS: Services, headless ones
included, work as on any cluster. The bridge enforces no NetworkPolicy, so the tests look at those objects only.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.cluster import host
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.credentials import USERS
from tests.controlplane.process import Component

KUBELET_PORT = 10250
DNS_SERVICE = "10.96.0.10"
SUBNET = "10.88.0.0/24"
PAUSE_IMAGE = "localhost/trimtab-pause:1"
KUBELET = f"system:node:{host.NODE}"
NODE_USERS: dict[str, tuple[str, ...]] = {
    **USERS,
    KUBELET: ("system:nodes",),
    "system:kube-proxy": (),
    "coredns": ("system:masters",),
}
"""The users of the control plane with those of a node."""


def control_plane(root: Path, binaries: Path) -> ControlPlane:
    """A control plane that pods can reach, and that can ask the node's kubelet for logs."""
    credentials = root / "control-plane" / "credentials"
    kubelet_client = {
        "kubelet_client_certificate": credentials / "kubelet-client.pem",
        "kubelet_client_key": credentials / "kubelet-client.key",
        "kubelet_preferred_address_types": "InternalIP",
    }
    return ControlPlane(
        root / "control-plane",
        binaries,
        address=host.ADDRESS,
        users=NODE_USERS,
        flags={"kube-apiserver": kubelet_client},
    )


class Node:
    """The node's processes; their files lie below `root`."""

    def __init__(self, root: Path, cluster: ControlPlane, binaries: Path, tools: Path) -> None:
        """`binaries`, `tools`: what `tests.kubernetes.build.binaries` and `node_tools` return."""
        self.root = root
        self._cluster = cluster
        self._binaries = binaries
        self._tools = tools
        self._logs = root / "logs"
        self._components: dict[str, Component] = {}
        self.socket = root / "containerd.sock"

    def start_containerd(self) -> None:
        """Starts containerd; from then on images can be imported."""
        self._logs.mkdir()
        self._start(
            "containerd", self._tools / "containerd", f"--config={self._write('containerd.toml', self._toml())}"
        )
        self._until("containerd", "an answer of containerd", lambda: self.ctr("version", check=False).returncode == 0)

    def start(self) -> None:
        """Starts the rest and waits until the node is Ready."""
        self._write("cni/net.d/10-trimtab.conflist", json.dumps(_cni(self.root)))
        self._write("resolv.conf", f"nameserver {host.ADDRESS}\n")
        self._start("coredns", self._tools / "coredns", f"-conf={self._write('Corefile', self._corefile())}")
        self._cluster.kubectl("apply", "--filename=-", stdin=json.dumps(_dns_service()))
        self.start_kubelet()
        config = self._write("kube-proxy.json", json.dumps(_kube_proxy(self._cluster.kubeconfig("system:kube-proxy"))))
        self._start("kube-proxy", self._binaries / "kube-proxy", f"--config={config}")
        wait = ("wait", "--for=condition=Ready", f"node/{host.NODE}", "--timeout=5s")
        self._until("kubelet", "a Ready node", lambda: self._cluster.kubectl(*wait, check=False).returncode == 0)

    def start_kubelet(self) -> None:
        """Starts the kubelet; containers that run go on."""
        config = self._write("kubelet.json", json.dumps(_kubelet(self.root, self._cluster.ca)))
        self._start(
            "kubelet",
            self._binaries / "kubelet",
            f"--config={config}",
            f"--kubeconfig={self._cluster.kubeconfig(KUBELET)}",
            f"--root-dir={self.root / 'kubelet'}",
            f"--cert-dir={self.root / 'kubelet-certificates'}",
            f"--hostname-override={host.NODE}",
            f"--node-ip={host.ADDRESS}",
        )

    def stop_kubelet(self) -> None:
        """Kills the kubelet; containers go on, and nobody reports about them."""
        self._components.pop("kubelet").kill()

    def stop(self) -> None:
        """Ends the processes; `host.sweep` removes the rest."""
        for component in reversed(list(self._components.values())):
            component.kill()
        self._components.clear()

    def ctr(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """containerd's own client, in the namespace of the kubelet's containers."""
        command = [str(self._tools / "ctr"), f"--address={self.socket}", "--namespace=k8s.io", *arguments]
        return subprocess.run(command, check=check, text=True, capture_output=True, **options)

    def kill_processes(self, pod_uid: str, pattern: str) -> list[int]:
        """`kill -9` of the pod's processes with `pattern` in their command line, as the machine sees them."""
        pids = [pid for pid in host.pod_processes(pod_uid) if pattern in host.command_line(pid)]
        host.kill(pids)
        return pids

    def kill_sandbox(self, pod_uid: str) -> list[int]:
        """`kill -9` of all that the pod is: its shim, its sandbox, its containers."""
        sandbox = self._sandbox(pod_uid)
        shims = [
            pid
            for pid in host.processes(self.root)
            if "containerd-shim" in host.command_line(pid) and sandbox in host.command_line(pid)
        ]
        pids = [*shims, *host.pod_processes(pod_uid)]
        host.kill(pids)
        return pids

    def _sandbox(self, pod_uid: str) -> str:
        query = f'labels."io.kubernetes.pod.uid"=={pod_uid},labels."io.cri-containerd.kind"==sandbox'
        return self.ctr("containers", "list", "--quiet", query).stdout.split()[0]

    def _start(self, name: str, program: Path, *arguments: str) -> None:
        environment = {**os.environ, "PATH": f"{self._tools}:{os.environ['PATH']}", "HOME": str(self.root)}
        log = self._logs / f"{name}.log"
        self._components[name] = Component(name, [str(program), *arguments], log, environment)

    def _until(self, name: str, what: str, condition: Any, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for component in self._components.values():
                component.check()
            if time.monotonic() > deadline:
                self._components[name].fail(f"{what} is not there after {seconds} s")
            time.sleep(0.2)

    def _write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def _toml(self) -> str:
        return f"""\
version = 3
root = "{self.root}/containerd/root"
state = "{self.root}/containerd/state"
disabled_plugins = ["io.containerd.nri.v1.nri"]

[grpc]
address = "{self.socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{self.root}/containerd/opt"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE_IMAGE}"

[plugins."io.containerd.cri.v1.runtime"]
disable_apparmor = true
disable_hugetlb_controller = true
tolerate_missing_hugetlb_controller = true
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{self._tools}/runc"
SystemdCgroup = false

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{self._tools}"]
conf_dir = "{self.root}/cni/net.d"
"""

    def _corefile(self) -> str:
        return f"""\
.:53 {{
    bind {host.ADDRESS}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {self._cluster.kubeconfig("coredns")}
    }}
}}
"""


def _cni(root: Path) -> dict[str, Any]:
    addresses = {"subnet": SUBNET, "rangeStart": "10.88.0.10", "gateway": host.ADDRESS}
    bridge = {
        "type": "bridge",
        "bridge": host.BRIDGE,
        "isGateway": True,
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[addresses]], "dataDir": str(root / "cni" / "networks")},
    }
    return {"cniVersion": "1.0.0", "name": "trimtab", "plugins": [bridge]}


def _kubelet(root: Path, ca: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": host.ADDRESS,
        "port": KUBELET_PORT,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(ca)},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{root}/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "resolvConf": str(root / "resolv.conf"),
        "podLogsDir": str(root / "pod-logs"),
        "volumePluginDir": str(root / "volume-plugins"),
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "enforceNodeAllocatable": [],
    }


def _kube_proxy(kubeconfig: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "clusterCIDR": SUBNET,
        "hostnameOverride": host.NODE,
        # Pods share a bridge: without it answers would go straight back and not be translated.
        "nftables": {"masqueradeAll": True},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "metricsBindAddress": f"{host.ADDRESS}:10249",
        "healthzBindAddress": f"{host.ADDRESS}:10256",
    }


def _dns_service() -> dict[str, Any]:
    ports = [
        {"name": name, "port": 53, "protocol": protocol} for name, protocol in (("dns", "UDP"), ("dns-tcp", "TCP"))
    ]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": DNS_SERVICE, "ports": ports},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns",
            "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [host.ADDRESS]}],
        "ports": ports,
    }
    return {"apiVersion": "v1", "kind": "List", "items": [service, endpoints]}
