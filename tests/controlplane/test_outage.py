"""An outage of the API server, of either sort, does not end the operator: it goes on as soon as the server is back."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.proxy import proxy
from tests.controlplane.operator import Operator

REFUSED_SECONDS = 20
FAILING_SECONDS = 65
"""Longer than kopf's own patience, which is 54 s."""


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


@pytest.fixture
async def running(control_plane: ControlPlane, tmp_path: Path) -> AsyncIterator[tuple[Operator, Any]]:
    """The operator, and the proxy that it goes through."""
    install_crds(control_plane)
    through = tmp_path / "kubeconfig"
    async with proxy(control_plane.kubeconfig("operator"), through) as between:
        operator = Operator(control_plane, kubeconfig=through)
        await asyncio.to_thread(operator.__enter__)
        try:
            yield operator, between
        finally:
            operator.__exit__(None, None, None)


async def test_it_outlives_the_api_server(
    control_plane: ControlPlane, namespace: str, running: tuple[Operator, Any]
) -> None:
    operator, between = running

    async def kubectl(*arguments: str, stdin: str | None = None) -> str:
        result = await asyncio.to_thread(control_plane.kubectl, *arguments, f"--namespace={namespace}", stdin=stdin)
        return result.stdout

    async def serve(name: str) -> None:
        manifest = {"apiVersion": "v1", "kind": "List", "items": endpoint(namespace, name)}
        await kubectl("create", "--filename=-", stdin=json.dumps(manifest))

    async def served(name: str) -> None:
        await kubectl("wait", "--for=condition=Ready", f"modelendpoint/{name}", "--timeout=120s")

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
