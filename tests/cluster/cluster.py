"""The cluster as its users have it: kubectl, helm, a team's namespace with a volume, and a client inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.cluster.clock import Clock
from tests.cluster.images import IMAGES, REPOSITORY
from tests.cluster.node import Node
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.jobs import until

from trimtab.manifests.load import load

HERE = Path(__file__).resolve().parent
CHART = REPOSITORY / "helm" / "trimtab"
RELEASE = "trimtab"
SYSTEM = "trimtab-system"
TEAM = "team"
"""Namespace and volume of those who train."""
USER = 65532
"""Of all our pods: the administrator of a shared volume gives it to them."""
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
SELFTEST_CLASS = "trimtab-selftest"

Object = dict[str, Any]


class Cluster:
    """A control plane with one node, and what people run against it."""

    def __init__(self, plane: ControlPlane, node: Node, helm: Path, clock: Clock) -> None:
        self.plane = plane
        self.node = node
        self.clock = clock
        self._helm = helm

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """kubectl as the administrator; its output."""
        return self.plane.kubectl(*arguments, stdin=stdin, check=check).stdout

    def get(self, *arguments: str) -> Object:
        """`kubectl get`, parsed."""
        return self.plane.get(*arguments)

    def items(self, kind: str, namespace: str | None, selector: str = "") -> list[Object]:
        """The objects of a kind, by name; None: of all namespaces."""
        where = f"--namespace={namespace}" if namespace else "--all-namespaces"
        found: list[Object] = self.get(kind, where, f"--selector={selector}")["items"]
        return sorted(found, key=lambda item: str(item["metadata"]["name"]))

    def apply(self, *objects: Object) -> None:
        """`kubectl apply` of objects."""
        self.kubectl("apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def helm(self, *arguments: str) -> str:
        """helm as the administrator; its output. AssertionError with it where it fails."""
        home = self.node.root / "helm"
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.plane.kubeconfig()),
            **{f"HELM_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")},
        }
        answer = subprocess.run([self._helm, *arguments], env=environment, text=True, capture_output=True, check=False)
        assert answer.returncode == 0, f"helm {' '.join(arguments)}:\n{answer.stdout}\n{answer.stderr}"
        return answer.stdout

    def install(self, *values: str) -> None:
        """The chart, as its README says, in a namespace of the restricted profile."""
        self.make_namespace(SYSTEM)
        self.provide_volume("selftest", storage_class=SELFTEST_CLASS)
        self.helm(
            "install",
            RELEASE,
            str(CHART),
            f"--namespace={SYSTEM}",
            f"--set=selftest.storageClassName={SELFTEST_CLASS}",
            "--set=selftest.resources.limits.memory=2Gi",
            *(f"--set={value}" for value in values),
            "--wait",
            "--timeout=5m",
        )

    def make_namespace(self, name: str) -> None:
        """A namespace under the restricted profile in which pods can be created."""
        self.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {**RESTRICTED}}},
        )
        self.kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={name}", "--timeout=60s")

    def clear(self) -> None:
        """Uninstalls the release and deletes the namespaces and volumes that are there."""
        self.helm("uninstall", RELEASE, f"--namespace={SYSTEM}", "--ignore-not-found", "--wait", "--timeout=5m")
        for name in (TEAM, SYSTEM):
            self.kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=300s")
        for volume in self.items("persistentvolumes", None):
            name = volume["metadata"]["name"]
            self.kubectl("delete", "persistentvolume", name, "--timeout=60s")
            shutil.rmtree(self.node.root / "volumes" / name)

    def provide_volume(self, name: str, *, storage_class: str) -> Path:
        """A volume that pods of this node share, as an administrator makes one; returns its folder."""
        folder = self.node.root / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        give(folder)
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {
                    "capacity": {"storage": "10Gi"},
                    "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                    "storageClassName": storage_class,
                    "persistentVolumeReclaimPolicy": "Retain",
                    "hostPath": {"path": str(folder)},
                },
            }
        )
        return folder

    def ask(self, url: str, model: str, *questions: str) -> list[Object]:
        """Puts questions to a served model with the `openai` client, from a pod of its own; the answers."""
        return self.run(IMAGES["serving"].name, "client.py", url, model, *questions)

    def run(self, image: str, script: str, *arguments: str) -> list[Object]:
        """Runs a script of this folder in a pod of the team; the lines that it writes, parsed."""
        (pod,) = read("pod.yaml")
        container = pod["spec"]["containers"][0]
        container |= {"image": image, "command": ["python", "-c", (HERE / script).read_text(), *arguments]}
        self.apply(pod)
        name, where = pod["metadata"]["name"], f"--namespace={TEAM}"

        def ended() -> str | None:
            phase = self.get("pod", name, where)["status"].get("phase", "Pending")
            return phase if phase in ("Succeeded", "Failed") else None

        try:
            phase = until(ended, f"the end of pod {name}, which runs {script}")
            log = self.kubectl("logs", name, where)
            assert phase == "Succeeded", log
            return [json.loads(line) for line in log.splitlines()]
        finally:
            self.kubectl("delete", "pod", name, where, "--grace-period=1")


def give(folder: Path) -> None:
    """Makes a folder and all in it belong to the user of our pods."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)


def read(name: str) -> list[Object]:
    """The objects of a YAML file beside this one."""
    return [document.obj for document in load(HERE / name)]
