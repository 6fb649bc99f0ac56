"""A real Kubernetes control plane in a directory, and KWOK as its fake kubelet.

`ControlPlane` starts etcd, kube-apiserver, kube-controller-manager and kube-scheduler on free loopback ports. Pods run
where `start_kwok` and `add_nodes` were called; KWOK then moves them as its Stages say (`stages/`). Every component ends
with the process that started it, however that ends.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.controlplane.credentials import LOOPBACK, USERS, Credentials
from tests.controlplane.process import ClusterError, Component, reserve_port

HERE = Path(__file__).resolve().parent
STAGES = tuple(sorted((HERE / "stages").glob("*.yaml")))
"""KWOK's Stages for nodes, pods and the reports of training and prepare pods."""

SERVICE_CIDR = "10.96.0.0/16"
START_SECONDS = 180
"""How long a component may take until it counts as failed: far more than the usual 10, for busy machines."""


class ControlPlane:
    """A control plane whose state lives below `root`; a context manager that starts and stops it.

    Attributes:
        url: Of the API server.
        ca: File with the certificate authority's certificate.
        root: Has `logs/NAME.log` of each component and `audit.log`.
    """

    def __init__(
        self,
        root: Path,
        binaries: Path,
        *,
        address: str = LOOPBACK,
        users: Mapping[str, tuple[str, ...]] = USERS,
        flags: Mapping[str, Mapping[str, object]] | None = None,
        audit_policy: Path = HERE / "audit-policy.yaml",
    ) -> None:
        """See above.

        Args:
            root: A folder that is made.
            binaries: What `tests.kubernetes.build.binaries` returns.
            address: Where the API server listens; pods reach one that is not loopback as `kubernetes.default.svc`.
            users: User name -> groups.
            flags: Component -> its flags beside ours, or in their place.
            audit_policy: What the audit log takes.
        """
        self.root = root
        self._audit_policy = audit_policy
        self._binaries = binaries
        self._address = address
        self._flags = flags or {}
        self._components: dict[str, Component] = {}
        # A child's death signal is bound to the thread that started it, so one thread that lives as long as we do
        # starts them all: a test may call us from an event loop's short-lived worker thread.
        self._spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")
        self._reservations = [reserve_port(address), reserve_port(), reserve_port()]
        self._port, self._etcd_port, self._peer_port = (held.getsockname()[1] for held in self._reservations)
        self.url = f"https://{address}:{self._port}"
        self._credentials = Credentials(root / "credentials", self.url, users)
        self.ca = self._credentials.ca

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts all components but KWOK and waits until pods can be created.

        Raises:
            ClusterError: A component exits, or is not ready after `START_SECONDS`.
        """
        (self.root / "logs").mkdir(parents=True)
        self._start_etcd()
        self.start_apiserver()
        self._start_controller_manager()
        self._start(
            "kube-scheduler",
            kubeconfig=self.kubeconfig("system:kube-scheduler"),
            leader_elect="false",
            kube_api_qps=500,
            kube_api_burst=1000,
            secure_port=0,
        )
        # Until the controller manager has made it, pods of the namespace are refused.
        self._wait("kube-controller-manager", "the service account default/default", self._has_default_account)

    def stop(self) -> None:
        """Kills all components and removes etcd's data; logs and the audit log stay. May be called twice."""
        for name in reversed(list(self._components)):
            self._kill(name)
        for held in self._reservations:
            held.close()
        self._spawner.shutdown()
        shutil.rmtree(self.root / "etcd", ignore_errors=True)

    def start_apiserver(self) -> None:
        """Starts the API server, at the same address each time, and waits until it is ready."""
        files = self._credentials.directory
        self._start(
            "kube-apiserver",
            etcd_servers=f"http://127.0.0.1:{self._etcd_port}",
            bind_address=self._address,
            advertise_address=self._address,
            secure_port=self._port,
            endpoint_reconciler_type="none" if self._address == LOOPBACK else "lease",
            tls_cert_file=files / "apiserver.pem",
            tls_private_key_file=files / "apiserver.key",
            token_auth_file=files / "tokens.csv",
            authorization_mode="Node,RBAC",
            service_account_key_file=files / "service-accounts.key",
            service_account_signing_key_file=files / "service-accounts.key",
            service_account_issuer="https://kubernetes.default.svc",
            service_cluster_ip_range=SERVICE_CIDR,
            allow_privileged="true",
            enable_admission_plugins="OwnerReferencesPermissionEnforcement",
            audit_policy_file=self._audit_policy,
            audit_log_path=self.root / "audit.log",
            audit_log_maxsize=4096,
        )
        self._wait("kube-apiserver", f"{self.url}/readyz", lambda: self._get("/readyz")[0] == http.HTTPStatus.OK)

    def stop_apiserver(self) -> None:
        """Kills the API server; until `start_apiserver` its address refuses connections."""
        self._kill("kube-apiserver")

    def restart_apiserver(self) -> None:
        """An outage of the API server, over when this returns."""
        self.stop_apiserver()
        self.start_apiserver()

    def start_kwok(self, *stages: Path) -> None:
        """Starts KWOK with these Stage files (`STAGES` without any), in place of a KWOK that runs."""
        if "kwok" in self._components:
            self._kill("kwok")
            # The next one would wait until the leases of this one are over.
            self.kubectl("delete", "leases", "--all", "--namespace=kube-node-lease")
        files = [f"--config={file}" for file in stages or STAGES]
        self._start(
            "kwok",
            *files,
            kubeconfig=self.kubeconfig("kwok"),
            manage_all_nodes="true",
            node_ip="127.0.0.1",
            cidr="10.244.0.0/16",
            node_lease_duration_seconds=40,  # off without it, and nodes turn NotReady after 50 s
        )

    @contextmanager
    def frozen_apiserver(self) -> Iterator[None]:
        """The API server stands still meanwhile: it accepts connections, and answers nothing."""
        self._components["kube-apiserver"].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._components["kube-apiserver"].send_signal(signal.SIGCONT)

    @contextmanager
    def frozen_nodes(self) -> Iterator[None]:
        """KWOK stands still meanwhile, so that no pod changes; shorter than a node's lease of 40 s."""
        self._components["kwok"].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._components["kwok"].send_signal(signal.SIGCONT)

    def add_nodes(self, count: int, *, gpus: int = 8, prefix: str = "node") -> list[str]:
        """Creates fake nodes named PREFIX-0, …, waits until they are Ready, and returns their names."""
        if "kwok" not in self._components:
            raise ClusterError("fake nodes become Ready by KWOK only: call start_kwok() first")
        names = [f"{prefix}-{index}" for index in range(count)]
        capacity = {"cpu": "64", "memory": "512Gi", "pods": "1000", "nvidia.com/gpu": str(gpus)}
        nodes = [
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {"capacity": capacity, "allocatable": capacity},
            }
            for name in names
        ]
        self.kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": nodes}))
        self._wait("kwok", "a Ready condition on each new node", lambda: self._ready_nodes().issuperset(names))
        return names

    def kubectl(
        self, *arguments: str, user: str = "admin", stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as one of the users of `credentials.USERS`.

        Raises:
            subprocess.CalledProcessError: `check` and an exit status other than 0; its note is what kubectl said.
        """
        result = subprocess.run(
            [self._binaries / "kubectl", f"--kubeconfig={self.kubeconfig(user)}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=self._environment(),
            check=False,
        )
        if check and result.returncode:
            error = subprocess.CalledProcessError(result.returncode, result.args, result.stdout, result.stderr)
            error.add_note(result.stderr)
            raise error
        return result

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ARGUMENTS -o json`, parsed."""
        answer: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "--output=json").stdout)
        return answer

    def audit(self) -> list[dict[str, Any]]:
        """The audit log so far, oldest first: all writes with their request bodies, and the test users' reads.

        An event is written when its request ends, which may be a moment after the client has its answer.
        """
        lines = (self.root / "audit.log").read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def kubeconfig(self, user: str = "admin") -> Path:
        """The kubeconfig of one of the users of `credentials.USERS`."""
        return self._credentials.kubeconfig(user)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """Writes a kubeconfig for an existing service account, with a token of one day as pods have it."""
        token = self.kubectl("create", "token", name, f"--namespace={namespace}", "--duration=24h").stdout.strip()
        return self._credentials.write_kubeconfig(f"{namespace}.{name}", token)

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, self._peer_port))
        self._start(
            "etcd",
            "--unsafe-no-fsync",
            data_dir=self.root / "etcd",
            listen_client_urls=client,
            advertise_client_urls=client,
            listen_peer_urls=peer,
            initial_advertise_peer_urls=peer,
            initial_cluster=f"default={peer}",
            logger="zap",
        )

    def _start_controller_manager(self) -> None:
        self._start(
            "kube-controller-manager",
            kubeconfig=self.kubeconfig("system:kube-controller-manager"),
            use_service_account_credentials="true",
            service_account_private_key_file=self._credentials.directory / "service-accounts.key",
            root_ca_file=self.ca,
            leader_elect="false",
            kube_api_qps=1000,
            kube_api_burst=2000,
            concurrent_job_syncs=20,
            secure_port=0,
        )

    def _has_default_account(self) -> bool:
        return self._get("/api/v1/namespaces/default/serviceaccounts/default")[0] == http.HTTPStatus.OK

    def _ready_nodes(self) -> set[str]:
        nodes = json.loads(self._get("/api/v1/nodes")[1])["items"]
        ready = {"type": "Ready", "status": "True"}
        return {
            node["metadata"]["name"]
            for node in nodes
            if any(ready.items() <= condition.items() for condition in node["status"].get("conditions", []))
        }

    def _get(self, path: str) -> tuple[int, str]:
        """A request as the admin, without kubectl's start-up cost: status and body."""
        context = ssl.create_default_context(cafile=self.ca)
        connection = http.client.HTTPSConnection(self._address, self._port, timeout=10, context=context)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self._credentials.tokens['admin']}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def _environment(self) -> dict[str, str]:
        """Of the components: a home of their own, so that no configuration of the user is read."""
        return {**os.environ, "HOME": str(self.root), "KUBECACHEDIR": str(self.root / "cache"), "KUBECONFIG": ""}

    def _start(self, name: str, *arguments: str, **options: object) -> None:
        options |= self._flags.get(name, {})
        flags = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
        command = [str(self._binaries / name), *flags, *arguments]
        log = self.root / "logs" / f"{name}.log"
        self._components[name] = self._spawner.submit(Component, name, command, log, self._environment()).result()

    def _kill(self, name: str) -> None:
        component = self._components.pop(name, None)
        if component is not None:
            component.kill()

    def _wait(self, name: str, what: str, condition: Callable[[], bool]) -> None:
        """Waits for a component; the error says what came instead."""
        deadline = time.monotonic() + START_SECONDS
        seen: Exception | None = None
        while time.monotonic() < deadline:
            for component in self._components.values():
                component.check()
            try:
                if condition():
                    return
            except (OSError, http.client.HTTPException) as error:
                seen = error
            time.sleep(0.05)
        self._components[name].fail(f"{what} is not there after {START_SECONDS} s ({seen or 'no error'})")
