"""An outage of the API server, or broken watches, don't end the operator: the same process goes on."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.proxy import Proxy, proxy
from tests.controlplane.faults.rules import Answer, Fault, Refuse, Rule
from tests.controlplane.operator import Operator

REFUSED_SECONDS = 20
FAILING_SECONDS = 65
"""Longer than kopf's own patience, which is 54 s."""
STORM_SECONDS = 10
AFTERWARDS_SECONDS = 30


def endpoint(namespace: str, name: str) -> list[dict[str, Any]]:
    """A ModelEndpoint with a claim that is bound beforehand."""
    metadata = {"name": name, "namespace": namespace}
    size = {"storage": "1Gi"}
    volume = {
        "capacity": size,
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "claimRef": metadata,
        "hostPath": {"path": "/nowhere"},
    }
    claim = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "volumeName": f"{namespace}-{name}",
        "resources": {"requests": size},
    }
    model = {"uri": f"pvc://{name}/model", "digest": "sha256:" + "a" * 64}
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{namespace}-{name}"}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claim},
        {
            "apiVersion": "trimtab.dev/v1alpha1",
            "kind": "ModelEndpoint",
            "metadata": metadata,
            "spec": {"servedModelName": name, "model": model},
        },
    ]


@dataclass(frozen=True)
class InStream(Fault):
    """A watch brings this in place of its first event, and ends in order."""

    line: bytes

    async def frames(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield self.line


class Namespace:
    """Where endpoints are created and waited for."""

    def __init__(self, control_plane: ControlPlane, name: str) -> None:
        self._control_plane = control_plane
        self._name = name

    async def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Its output."""
        arguments = (*arguments, f"--namespace={self._name}")
        return (await asyncio.to_thread(self._control_plane.kubectl, *arguments, stdin=stdin)).stdout

    async def serve(self, name: str) -> None:
        """Create an endpoint."""
        manifest = {"apiVersion": "v1", "kind": "List", "items": endpoint(self._name, name)}
        await self.kubectl("create", "--filename=-", stdin=json.dumps(manifest))

    async def served(self, name: str, seconds: int = 120) -> None:
        """Wait until it is ready."""
        await self.kubectl("wait", "--for=condition=Ready", f"modelendpoint/{name}", f"--timeout={seconds}s")


@pytest.fixture
def here(control_plane: ControlPlane, namespace: str) -> Namespace:
    return Namespace(control_plane, namespace)


@pytest.fixture
async def running(control_plane: ControlPlane, tmp_path: Path) -> AsyncIterator[tuple[Operator, Proxy]]:
    """The operator, and the proxy that it goes through."""
    install_crds(control_plane)
    through = tmp_path / "kubeconfig"
    async with proxy(control_plane.kubeconfig("operator"), through) as between:
        operator = Operator(control_plane, kubeconfig=through)
        await asyncio.to_thread(operator.__enter__)
        try:
            yield operator, between
        finally:
            await asyncio.to_thread(operator.close)


async def test_broken_watches_end_no_process(here: Namespace, running: tuple[Operator, Proxy]) -> None:
    operator, between = running
    error = {"type": "ERROR", "object": Answer(500, "InternalError").status}
    faults = {
        "error": Rule(InStream(json.dumps(error).encode() + b"\n"), watches=True, times=1),
        "cut-off": Rule(InStream(b'{"type": "MODIFIED", "object": {"metad'), watches=True, times=1),
        "throttled": Rule(Refuse(429, "TooManyRequests", retry_after=1)),
        "throttled-watch": Rule(Refuse(429, "TooManyRequests"), watches=True),
        "broken-watch": Rule(Refuse(500, "InternalError"), watches=True),
    }
    for number, (name, rule) in enumerate(faults.items()):
        between.add(rule)
        between.break_connections()
        if rule.times is None:
            await asyncio.sleep(STORM_SECONDS)
            between.remove(rule)
        await here.serve(name)
        await here.served(name, AFTERWARDS_SECONDS)
        assert rule.hits > 0
        restarts = await asyncio.to_thread(operator.value, "watch_restarts")
        assert restarts == min(number + 1, 2)  # the first two end kopf, not the process
    assert await asyncio.to_thread(operator.stop) == 0


async def test_it_outlives_the_api_server(
    control_plane: ControlPlane, here: Namespace, running: tuple[Operator, Proxy]
) -> None:
    operator, between = running
    serve, served, kubectl = here.serve, here.served, here.kubectl

    await serve("before")
    await served("before")

    await asyncio.to_thread(control_plane.stop_apiserver)
    await asyncio.sleep(REFUSED_SECONDS)
    await asyncio.to_thread(control_plane.start_apiserver)
    await serve("refused")
    await served("refused")

    between.failing = True
    await serve("failing")  # and what was deleted meanwhile is noticed too
    await kubectl("delete", "deployment", "--selector=trimtab.dev/endpoint=before")
    await asyncio.sleep(FAILING_SECONDS)
    assert between.failures > 0
    assert "Healthy" not in await kubectl("get", "modelendpoint/failing")
    between.failing = False
    await served("failing")
    await served("before")
    assert len(json.loads(await kubectl("get", "deployments", "--output=json"))["items"]) == 3

    requests = (await asyncio.to_thread(operator.metrics))["trimtab_operator_api_requests"]
    assert {sample.labels["code"] for sample in requests.samples} >= {"200", "201"}
    assert await asyncio.to_thread(operator.stop) == 0  # the same process, from beginning to end
