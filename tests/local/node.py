"""A working folder with API, controllers and kubelet, but without the operator; pods are small Python scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kube_contract.support import eventually

from trimtab.local.addresses import Addresses
from trimtab.local.kube import LocalKube
from trimtab.local.kubelet import Kubelet
from trimtab.local.services import Services
from trimtab.local.state import State
from trimtab.local.workdir import Workdir
from trimtab.local.workloads import Workloads
from trimtab_operator.core.kube import POD, Object


@dataclass
class Node:
    """The parts."""

    workdir: Workdir
    kube: LocalKube
    kubelet: Kubelet
    services: Services

    async def run(self, name: str, script: str, **spec: Any) -> None:
        """Create a pod whose container runs `script`."""
        self.kube.put(pod(name, script, **spec))

    def pod(self, name: str) -> Object:
        """The pod as it is; empty where there is none."""
        return self.kube.find(POD, "default", name) or {}

    async def phase(self, name: str, *phases: str) -> Object:
        """Wait until the pod has one of the phases."""

        async def reached() -> Object | None:
            found = self.pod(name)
            return found if found.get("status", {}).get("phase") in phases else None

        return await eventually(reached)

    async def ended(self, name: str) -> dict[str, Any]:
        """Wait for the pod's end: how its container ended."""
        found = await self.phase(name, "Succeeded", "Failed")
        return dict(found["status"]["containerStatuses"][0]["state"]["terminated"])

    async def ready(self, name: str) -> Object:
        """Wait until the pod is ready."""

        async def is_ready() -> Object | None:
            found = self.pod(name)
            return found if holds(found, "Ready") else None

        return await eventually(is_ready)

    def log(self, name: str) -> str:
        """What the container wrote."""
        path = self.workdir.log("default", name)
        return path.read_text() if path.exists() else ""


@asynccontextmanager
async def node(root: Path) -> AsyncIterator[Node]:
    """Everything running; stopped on the way out."""
    workdir = Workdir(root)
    with workdir.lock() as lock:
        state = State(workdir.state)
        addresses = Addresses(root, lambda: (each["status"].get("podIP", "") for each in kube.select(POD)))
        kube = LocalKube(state, addresses.take)
        try:
            async with asyncio.TaskGroup() as tasks:
                kubelet = Kubelet(kube, workdir, addresses, lock, tasks)
                services = Services(kube)
                relay = tasks.create_task(services.run())
                kubelet.begin()
                Workloads(kube, lambda _: True).begin()
                try:
                    yield Node(workdir, kube, kubelet, services)
                finally:
                    await kubelet.close()
                    relay.cancel()
        finally:
            state.close()


def pod(name: str, script: str, **fields: Any) -> Object:
    """A pod with one container; fields of the container in `container`, others belong to the pod's spec."""
    container = {"name": "main", "image": "none", "command": ["python", "-c", script], **fields.pop("container", {})}
    metadata = {"name": name, "namespace": "default", "labels": fields.pop("labels", {})}
    spec = {"restartPolicy": "Never", "containers": [container], **fields}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def holds(obj: Object, kind: str) -> bool:
    """Whether a condition is True."""
    conditions = obj.get("status", {}).get("conditions", [])
    return any(entry["type"] == kind and entry["status"] == "True" for entry in conditions)
