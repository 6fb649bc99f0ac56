"""A proxy in front of the API server that fails when a test asks for it."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import yaml
from aiohttp import web

HOP_BY_HOP = {"connection", "content-encoding", "content-length", "host", "keep-alive", "transfer-encoding"}


class Proxy:
    """Passes requests on, watches too; while `failing`, it answers 503 and has cut the open ones.

    Attributes:
        failures: How many requests were answered 503.
        held: Set once a request is held back; may be waited for in another thread.
    """

    def __init__(self, server: str, session: aiohttp.ClientSession) -> None:
        self._server = server
        self._session = session
        self._open: set[asyncio.Task[object]] = set()
        self._failing = False
        self._awaited: list[re.Pattern[str]] = []
        self._released = threading.Event()
        self.held = threading.Event()
        self.failures = 0

    @property
    def failing(self) -> bool:
        """Whether every request fails."""
        return self._failing

    @failing.setter
    def failing(self, failing: bool) -> None:
        self._failing = failing
        for task in list(self._open) if failing else ():
            task.cancel()

    def hold(self, *requests: str) -> None:
        """After requests that match these patterns have come in this order, hold back the last one until `release`.

        Each pattern matches a method and a path, e.g. `POST /apis/.*/jobs`.
        """
        self.held.clear()
        self._released.clear()
        self._awaited = [re.compile(pattern) for pattern in requests]

    def release(self) -> None:
        """Refuse what is held back; it never reaches the API server. May be called in another thread."""
        self._released.set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        if self._failing:
            self.failures += 1
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 503}
            return web.json_response(status | {"reason": "ServiceUnavailable", "message": "out for a test"}, status=503)
        if self._awaited and self._awaited[0].fullmatch(f"{request.method} {request.path}"):
            self._awaited.pop(0)
            if not self._awaited:
                self.held.set()
                await asyncio.to_thread(self._released.wait)
                raise web.HTTPServiceUnavailable
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            return await self._forward(request)
        finally:
            self._open.discard(task)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        async with self._session.request(
            request.method,
            self._server + request.path_qs,
            headers={key: value for key, value in request.headers.items() if key.lower() not in HOP_BY_HOP},
            data=await request.read() or None,
        ) as upstream:
            headers = {key: value for key, value in upstream.headers.items() if key.lower() not in HOP_BY_HOP}
            response = web.StreamResponse(status=upstream.status, headers=headers)
            with suppress(aiohttp.ClientConnectionResetError):  # the client has had enough: the end of a watch
                await response.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
            return response


@asynccontextmanager
async def proxy(kubeconfig: Path, through: Path) -> AsyncIterator[Proxy]:
    """A proxy to the API server of `kubeconfig`; `through` becomes a kubeconfig for going through it."""
    config = yaml.safe_load(await asyncio.to_thread(kubeconfig.read_text))
    cluster = config["clusters"][0]["cluster"]
    trusting = ssl.create_default_context(cafile=cluster["certificate-authority"])
    connector = aiohttp.TCPConnector(ssl=trusting, limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=True) as session:
        running = Proxy(cluster["server"], session)
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", running.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}
        await asyncio.to_thread(through.write_text, json.dumps(config))
        try:
            yield running
        finally:
            await runner.cleanup()
