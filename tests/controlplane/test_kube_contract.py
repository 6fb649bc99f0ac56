"""The API server keeps the contract of `Kube`."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.kube_contract.suite import *  # noqa: F403
from tests.kube_contract.support import Api, Recorder
from tests.kube_contract.workloads import *  # noqa: F403

from trimtab_operator.core.api_server import connect
from trimtab_operator.core.credentials import Credentials, load
from trimtab_operator.core.kube import CONFIGMAP, Change


@pytest.fixture(scope="module", autouse=True)
def crds(control_plane: ControlPlane) -> None:
    install_crds(control_plane)


@pytest.fixture
async def api(control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig()))
    credentials = await load()
    recorder = Recorder()
    listening = asyncio.Event()
    watch = asyncio.create_task(record(credentials, namespace, recorder, listening))
    await listening.wait()
    async with connect(credentials, requests_per_second=500, burst=1000) as kube:
        yield Api(kube, namespace, recorder)
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def record(credentials: Credentials, namespace: str, recorder: Recorder, listening: asyncio.Event) -> None:
    """Watch the namespace's ConfigMaps from now on."""
    headers = {"Authorization": await credentials.authorization() or ""}
    url = f"{credentials.server}{CONFIGMAP.path}/namespaces/{namespace}/{CONFIGMAP.plural}"
    connector = aiohttp.TCPConnector(ssl=credentials.ssl_context())
    async with aiohttp.ClientSession(connector=connector, headers=headers, read_bufsize=2**20) as session:
        async with session.get(url) as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        async with session.get(url, params={"watch": "true", "resourceVersion": version}) as stream:
            listening.set()
            async for line in stream.content:
                event = json.loads(line)
                recorder(Change.DELETE if event["type"] == "DELETED" else Change.UPSERT, event["object"])
