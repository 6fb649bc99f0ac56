"""The life of a job, from submission to rest, with faults in it; and what is left at its end, fit to be compared."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.faults.instance import Instance
from tests.controlplane.faults.proxy import Proxy, View, Written, proxy
from tests.controlplane.jobs import QUICKSTART, Object, read

from trimtab_operator.core.api_server import ApiServer, connect
from trimtab_operator.core.credentials import Credentials
from trimtab_operator.core.kube import (
    CLAIM,
    CONFIGMAP,
    DEPLOYMENT,
    FINETUNEJOB,
    JOB,
    MODELENDPOINT,
    SERVICE,
    Kind,
)
from trimtab_operator.core.settings import Settings

T = TypeVar("T")

PATIENCE_SECONDS = 240
QUIET_SECONDS = 1.5
SETTINGS = Settings(workers=4, resync_seconds=5, backoff_cap_seconds=2)
"""Listed anew so often that what no event told of comes to light while the test waits."""
KEPT = (FINETUNEJOB, MODELENDPOINT, JOB, DEPLOYMENT, SERVICE, CONFIGMAP)
VOLATILE = {
    *("lastTransitionTime", "startTime", "completionTime", "activeSince", "activeSeconds", "message"),
    *("resourceVersion", "creationTimestamp", "managedFields", "uid", "clusterIP", "clusterIPs", "jobUID"),
    *("lastUpdateTime", "generation", "observedGeneration", "remainingText", "estimatedRemainingSeconds"),
}
UNIQUE = re.compile(
    r"\b([0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{12}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8})\b"
)
"""Digests, revisions, uids and the part of a name that follows from a uid."""


def normalised(value: Any) -> Any:
    """What does not depend on time or on what is unique to one run."""
    if isinstance(value, dict):
        return {UNIQUE.sub("#", key): normalised(each) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [normalised(each) for each in value]
    return UNIQUE.sub("#", value) if isinstance(value, str) else value


class Life:
    """A namespace with a job of its own, and the operator that looks after it through a proxy of its own."""

    def __init__(self, world: World, namespace: str, between: Proxy, through: Credentials) -> None:
        self.world = world
        self.namespace = namespace
        self.between = between
        self._through = through
        self.operator = Instance(through, namespace, world.settings)

    async def start(self) -> None:
        """The operator starts; for the first time, or after `die`."""
        self.between.cut = False
        self.operator = Instance(self._through, self.namespace, self.world.settings)
        await self.operator.start()

    async def die(self) -> None:
        """`kill -9`: its connections break, and nothing of it goes on."""
        self.between.cut = True
        await self.operator.die()

    async def submit(self, *objects: Object) -> None:
        """A user creates these."""
        for obj in objects:
            await self.world.kube.create(obj, manager="user")

    def manifests(self, **spec: Any) -> tuple[Object, Object]:
        """The quickstart's job and its second endpoint, in this namespace."""
        job, base = read(QUICKSTART / "job.yaml", self.namespace)
        job["spec"] |= spec
        return job, base

    async def get(self, kind: Kind, name: str) -> Object | None:
        """The live object."""
        return await self.world.kube.get(kind, self.namespace, name)

    async def items(self, kind: Kind) -> list[Object]:
        """The live objects of a kind, by name."""
        found = await self.world.kube.list_objects(kind, namespace=self.namespace)
        return sorted(found, key=lambda obj: obj["metadata"]["name"])

    async def until(self, condition: Callable[[], Awaitable[T]], what: str, seconds: float = PATIENCE_SECONDS) -> T:
        """The first true answer."""
        try:
            return await until(condition, seconds)
        except TimeoutError:
            raise AssertionError(f"{self.namespace}: {what}: not so after {seconds} s\n{self.story()}") from None

    async def holds(self, kind: Kind, name: str, condition: str) -> bool:
        """Whether a condition is true."""
        obj = await self.get(kind, name)
        conditions = (obj or {}).get("status", {}).get("conditions", [])
        return any(c["type"] == condition and c["status"] == "True" for c in conditions)

    async def served(self) -> bool:
        """The job is complete, and both endpoints answer."""
        return all(
            [
                await self.holds(FINETUNEJOB, "quickstart", "Complete"),
                await self.holds(MODELENDPOINT, "quickstart", "Ready"),
                await self.holds(MODELENDPOINT, "quickstart-base", "Ready"),
            ]
        )

    async def rest(self) -> None:
        """Waits until nothing has been written for a while."""
        count, since = -1, 0.0
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() - since < QUIET_SECONDS or count != len(self.writes()):
            if count != len(self.writes()):
                count, since = len(self.writes()), time.monotonic()
            assert time.monotonic() < deadline, f"{self.namespace}: no rest\n{self.story()}"
            await asyncio.sleep(0.1)

    def writes(self) -> list[Written]:
        """What the operator wrote, Events apart."""
        return [write for write in self.between.written if "/events" not in write.path]

    async def view(self) -> View:
        """What the operator's lists answer now."""
        lists = {}
        for path in self.between.lists:
            lists[path] = await self.world.read(path)
        return View(lists)

    def story(self) -> str:
        """The writes, one a line."""
        return "\n".join(map(str, self.between.written))

    def created(self) -> Counter[str]:
        """How often each Job of an attempt was created, by its normalised name."""
        return Counter(
            normalised(write.answer["metadata"]["name"])
            for write in self.writes()
            if write.method == "POST" and write.path.endswith("/jobs") and write.code == 201
        )

    def deleted(self) -> Counter[str]:
        """How often each child was deleted."""
        return Counter(
            normalised(write.path.removeprefix("/apis").replace(self.namespace, "NAMESPACE"))
            for write in self.writes()
            if write.method == "DELETE" and write.carried_out
        )

    async def remains(self) -> dict[str, Any]:
        """All that is there at the end, by kind and name, normalised."""
        found: dict[str, Any] = {}
        for kind in KEPT:
            for obj in await self.items(kind):
                if kind is CONFIGMAP and obj["metadata"]["name"] == "kube-root-ca.crt":
                    continue
                left = normalised({key: obj.get(key) for key in ("metadata", "spec", "data", "status")})
                if kind not in (FINETUNEJOB, MODELENDPOINT):
                    del left["status"]
                found[f"{kind.kind} {left['metadata']['name']}"] = left
        return found


class World:
    """A control plane in which lives are led."""

    def __init__(
        self, control_plane: ControlPlane, directory: Path, kube: ApiServer, admin: aiohttp.ClientSession
    ) -> None:
        self.control_plane = control_plane
        self.directory = directory
        self.kube = kube
        self._admin = admin
        self.settings = SETTINGS

    async def request(self, method: str, path: str, body: Object | None = None) -> Object:
        """A request as the admin; AssertionError where it fails."""
        code, said = await self.send(method, path, body)
        assert code < 400, f"{method} {path}: {said}"
        return said

    async def send(self, method: str, path: str, body: Object | None = None) -> tuple[int, Object]:
        """A request as the admin: status and answer."""
        headers = {"Content-Type": "application/merge-patch+json"} if method == "PATCH" else {}
        async with self._admin.request(method, self.control_plane.url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def read(self, path: str) -> bytes:
        """The text that a GET answers."""
        async with self._admin.get(self.control_plane.url + path) as answer:
            return await answer.read()

    @asynccontextmanager
    async def life(self, *, start: bool = True) -> AsyncIterator[Life]:
        """A new namespace with the quickstart's claim and a running operator; gone afterwards."""
        namespace = f"life-{uuid.uuid4().hex[:8]}"
        await self.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        await self._provide(namespace)
        through = self.directory / namespace
        async with AsyncExitStack() as stack:
            between = await stack.enter_async_context(proxy(self.control_plane.kubeconfig("operator"), through))
            life = Life(self, namespace, between, await credentials(through))
            try:
                if start:
                    await life.start()
                yield life
            finally:
                await life.die()
                for kind in ("namespaces", "persistentvolumes"):
                    await self.send("DELETE", f"/api/v1/{kind}/{namespace}")

    async def _provide(self, namespace: str) -> None:
        """The quickstart's claim, bound; and the service account without which pods are refused."""
        claim = read(QUICKSTART / "claim.yaml", namespace)[0]
        reference = {"namespace": namespace, "name": claim["metadata"]["name"]}
        spec = {
            "capacity": claim["spec"]["resources"]["requests"],
            "accessModes": claim["spec"]["accessModes"],
            "hostPath": {"path": "/nowhere"},
            "claimRef": reference,
        }
        await self.request("POST", "/api/v1/persistentvolumes", {"metadata": {"name": namespace}, "spec": spec})
        await self.kube.create(claim, manager="user")

        async def ready() -> bool:
            bound = await self.kube.get(CLAIM, namespace, claim["metadata"]["name"])
            accounts = await self.request("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts")
            return bool(bound and bound.get("status", {}).get("phase") == "Bound" and accounts["items"])

        await until(ready, PATIENCE_SECONDS)


async def until(condition: Callable[[], Awaitable[T]], seconds: float) -> T:
    """The first true answer; TimeoutError where there is none in time."""
    async with asyncio.timeout(seconds):
        while True:
            if answer := await condition():
                return answer
            await asyncio.sleep(0.2)


async def credentials(kubeconfig: Path) -> Credentials:
    """Of a kubeconfig that `$KUBECONFIG` does not name."""
    from kubernetes.aio import config
    from kubernetes.aio.client import Configuration

    configuration = Configuration()
    await config.load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
    return Credentials(configuration)


@asynccontextmanager
async def world(control_plane: ControlPlane, directory: Path) -> AsyncIterator[World]:
    """The world of one test."""
    admin = await credentials(control_plane.kubeconfig())
    headers = {"Authorization": await admin.authorization() or ""}
    connector = aiohttp.TCPConnector(ssl=admin.ssl_context(), limit=64)
    async with (
        connect(admin, requests_per_second=1000, burst=1000) as kube,
        aiohttp.ClientSession(connector=connector, headers=headers) as session,
    ):
        yield World(control_plane, directory, kube, session)
