"""The operator's runtime in the test's own process: dozens run side by side, and each can die like a process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

import aiohttp

from trimtab_operator.core.api_server import ApiServer
from trimtab_operator.core.credentials import Credentials
from trimtab_operator.core.kube import CHILDREN, CLAIM, OWNERS, Change, Kind, Object, Sink
from trimtab_operator.core.rate import TokenBucket
from trimtab_operator.core.runtime import CHILD_LABELS, Runtime
from trimtab_operator.core.settings import Settings
from trimtab_operator.kinds import kinds

_OWNER: ContextVar[Instance | None] = ContextVar("instance", default=None)


class Watches:
    """`Feed` of one namespace: a list and a watch of each kind, begun anew whenever it ends."""

    def __init__(self, session: aiohttp.ClientSession, credentials: Credentials, namespace: str) -> None:
        self._session = session
        self._credentials = credentials
        self._namespace = namespace
        self._sinks: list[Sink] = []

    def subscribe(self, sink: Sink) -> None:
        """Deliver every later event to `sink`."""
        self._sinks.append(sink)

    async def run(self) -> None:
        """Follow all kinds until cancelled."""
        await asyncio.gather(*(self._follow(kind) for kind in (*OWNERS, *CHILDREN, CLAIM)))

    async def _follow(self, kind: Kind) -> None:
        url = f"{self._credentials.server}{kind.path}/namespaces/{self._namespace}/{kind.plural}"
        selector = ",".join(f"{label}={value}" for label, value in CHILD_LABELS.items())
        params = {"labelSelector": selector} if kind in CHILDREN else {}
        headers = {"Authorization": await self._credentials.authorization() or ""}
        while True:
            try:
                async with self._session.get(url, params={"limit": "500", **params}, headers=headers) as answer:
                    listed = await answer.json()
                for obj in listed["items"]:
                    self._tell(kind, Change.UPSERT, obj)
                more = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
                async with self._session.get(url, params={**params, **more}, headers=headers) as stream:
                    async for line in stream.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        change = Change.DELETE if event["type"] == "DELETED" else Change.UPSERT
                        self._tell(kind, change, event["object"])
            except (aiohttp.ClientError, OSError, KeyError, ValueError):
                await asyncio.sleep(0.1)

    def _tell(self, kind: Kind, change: Change, obj: Object) -> None:
        for sink in self._sinks:
            sink(change, {**obj, "apiVersion": kind.api_version, "kind": kind.kind})


class Instance:
    """One life of the operator, in one namespace."""

    def __init__(self, credentials: Credentials, namespace: str, settings: Settings) -> None:
        self._credentials = credentials
        self._namespace = namespace
        self._settings = settings.model_copy(update={"watch_namespaces": (namespace,)})
        self._session: aiohttp.ClientSession | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.runtime: Runtime | None = None

    async def start(self) -> None:
        """List everything and begin to work."""
        asyncio.get_running_loop().set_task_factory(_adopting)
        token = _OWNER.set(self)
        try:
            await asyncio.create_task(self._start())
        finally:
            _OWNER.reset(token)

    async def _start(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=2**22)
        requests = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        self._sessions = (self._session, requests)
        watches = Watches(self._session, self._credentials, self._namespace)
        kube = ApiServer(requests, self._credentials, TokenBucket(500, 1000))
        controllers, companions = kinds(kube, self._settings)
        runtime = Runtime(kube, watches, controllers, self._settings, companions=companions)
        self.runtime = runtime
        await runtime.start()
        runtime.workers.begin()
        self._watching = asyncio.create_task(watches.run())

    async def die(self) -> None:
        """End all that it runs, at once: nothing is finished, nothing is written."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for session in self._sessions:
            await session.close()


def _adopting(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    """Make a task, and note it with the instance in whose name it is made."""
    task = asyncio.Task(coroutine, loop=loop, **options)
    if (owner := _OWNER.get()) is not None:
        owner.tasks.add(task)
        task.add_done_callback(owner.tasks.discard)
    return task
