"""A Service's address reaches ready pods only."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.kube_contract.support import eventually
from tests.local.node import Node, node
from tests.local.test_kubelet import SERVER, http_probe, server

from trimtab.local.workdir import LocalError
from trimtab_operator.core.kube import SERVICE, Object


def service(**spec: Any) -> Object:
    metadata = {"name": "web", "namespace": "default"}
    body = {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}], **spec}
    return {"apiVersion": SERVICE.api_version, "kind": SERVICE.kind, "metadata": metadata, "spec": body}


async def ask(address: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/a") as answer:
        return await answer.text()


async def start(local: Node, name: str, flags: Path) -> None:
    container = server(name, flags, readinessProbe=http_probe("/ready", timeoutSeconds=20))
    await local.run(name, SERVER, labels={"app": "web"}, container=container)
    await local.phase(name, "Running")


async def test_connections_go_round_the_ready_pods(tmp_path: Path) -> None:
    async with node(tmp_path / "work") as local:
        address = local.kube.put(service())["spec"]["clusterIP"]
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a").touch()
            await start(local, name, tmp_path / name)
        (tmp_path / "one" / "ready").touch()
        await local.ready("one")
        assert {await ask(address) for _ in range(4)} == {"one"}, "a pod that is not ready gets nothing"
        (tmp_path / "two" / "ready").touch()
        await local.ready("two")
        assert {await ask(address) for _ in range(4)} == {"one", "two"}
        for name in ("one", "two"):
            (tmp_path / name / "ready").unlink()

        async def nobody() -> bool:
            return not local.services.ready("default", "web")

        await eventually(nobody)
        with pytest.raises(aiohttp.ClientError):
            await ask(address)


async def test_a_headless_service_has_no_address(tmp_path: Path) -> None:
    async with node(tmp_path) as local:
        assert local.kube.put(service(clusterIP="None"))["spec"]["clusterIP"] == "None"
        await asyncio.sleep(0.1)  # a failure to listen would end the node


async def listen(root: Path, port: int) -> None:
    async with node(root) as local:
        local.kube.put(service(ports=[{"name": "http", "port": port}]))
        await asyncio.sleep(60)


async def test_a_port_in_use_ends_the_run_with_address_port_and_remedy(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ExceptionGroup) as raised:
            await listen(tmp_path, port)
    words = rf"default/web: can't listen on 127\.[0-9.]+ port {port}: Address already in use; .*ss -ltnp"
    assert raised.group_contains(LocalError, match=words)
