"""Services: from each clusterIP to a ready pod, connection by connection."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

from trimtab.local.container import named_port
from trimtab.local.kube import LocalKube
from trimtab.local.objects import is_true
from trimtab.local.workdir import LocalError
from trimtab_operator.core.kube import POD, SERVICE, Change, Object, Ref, ref_of

_CHUNK = 1 << 16


class Services:
    """Listens on each Service's address. Headless Services have none: their names are resolved by the kubelet."""

    def __init__(self, kube: LocalKube) -> None:
        self._kube = kube
        self._changes: asyncio.Queue[tuple[Change, Object]] = asyncio.Queue()
        self._servers: dict[Ref, list[asyncio.Server]] = {}
        self._turn = 0

    async def run(self) -> None:
        """Follow the API until cancelled.

        Raises:
            LocalError: an address can't be listened on.
        """
        for service in self._kube.select(SERVICE):
            self._heed(Change.UPSERT, service)
        self._kube.subscribe(self._heed)
        try:
            while True:
                change, service = await self._changes.get()
                ref = ref_of(service)
                if change is Change.DELETE:
                    for server in self._servers.pop(ref, []):
                        server.close()
                elif ref not in self._servers and service["spec"]["clusterIP"] != "None":
                    self._servers[ref] = [await self._listen(service, port) for port in service["spec"]["ports"]]
        finally:
            for server in [server for servers in self._servers.values() for server in servers]:
                server.close()

    def _heed(self, change: Change, obj: Object) -> None:
        if obj["kind"] == SERVICE.kind:
            self._changes.put_nowait((change, obj))

    async def _listen(self, service: Object, port: dict[str, Any]) -> asyncio.Server:
        address, number = service["spec"]["clusterIP"], port["port"]
        namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._relay(namespace, name, port, reader, writer)

        try:
            return await asyncio.start_server(connected, address, number)
        except OSError as error:
            raise LocalError(
                f"service {namespace}/{name}: can't listen on {address} port {number}: {os.strerror(error.errno or 0)};"
                f" find the process that holds the port with `ss -ltnp 'sport = :{number}'` and stop it"
            ) from error

    def ready(self, namespace: str, name: str) -> list[Object]:
        """The pods that a Service reaches now."""
        service = self._kube.find(SERVICE, namespace, name)
        if service is None or not service["spec"].get("selector"):
            return []
        pods = self._kube.select(POD, namespace, service["spec"]["selector"])
        return [pod for pod in pods if is_true(pod, "Ready") and "deletionTimestamp" not in pod["metadata"]]

    async def _relay(
        self,
        namespace: str,
        name: str,
        port: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            pods = self.ready(namespace, name)
            if pods:
                self._turn += 1
                pod = pods[self._turn % len(pods)]
                target = named_port(pod["spec"]["containers"][0], port.get("targetPort", port["port"]))
                there_reader, there_writer = await asyncio.open_connection(pod["status"]["podIP"], target)
                try:
                    await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
                finally:
                    there_writer.close()
        except OSError:
            pass  # a pod that went away; the client sees the closed connection
        finally:
            writer.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        target.write(data)
        await target.drain()
    with suppress(OSError):
        target.write_eof()
