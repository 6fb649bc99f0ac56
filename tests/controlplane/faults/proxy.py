"""A proxy in front of the API server that fails as its rules say, and remembers what was written through it."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from tests.controlplane.faults.rules import WRITE, Answer, Dropped, Object, Refuse, Rule

HOP_BY_HOP = {"connection", "content-encoding", "content-length", "host", "keep-alive", "transfer-encoding"}
_OUT = Rule(Refuse(503, "ServiceUnavailable"))


@dataclass(frozen=True)
class Written:
    """A write that the API server has answered."""

    method: str
    path: str
    code: int
    body: Object
    answer: Object

    @property
    def carried_out(self) -> bool:
        """It was not refused."""
        return self.code < 400

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.code}"


@dataclass(frozen=True)
class View:
    """What lists once answered: served again, it is a stale view of the cluster."""

    lists: dict[str, bytes]
    """Path with query to body."""


class Proxy:
    """Passes requests on, watches too, except where a rule takes one; the first rule that does so counts.

    Attributes:
        written: All writes that reached the API server, in the order of their answers.
        noted: Awaited after each write, before its answer is passed on.
        failures: How many requests were answered with an error of a rule.
        held: Set once a request is held back; may be waited for in another thread.
        opened: How many requests came in.
    """

    def __init__(self, server: str, session: aiohttp.ClientSession) -> None:
        self._server = server
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._open: set[asyncio.Task[object]] = set()
        self._rules: list[Rule] = []
        self._awaited: list[re.Pattern[str]] = []
        self._released = threading.Event()
        self._stale: View | None = None
        self._thawed = asyncio.Event()
        self._cut = False
        self.held = threading.Event()
        self.written: list[Written] = []
        self.noted: Callable[[Written], Awaitable[None]] | None = None
        self.lists: dict[str, bytes] = {}
        self.failures = 0
        self.opened = 0

    def add(self, *rules: Rule) -> None:
        """Heed these rules too."""
        self._rules += rules

    def remove(self, *rules: Rule) -> None:
        """Heed these rules no longer."""
        self._rules = [rule for rule in self._rules if not any(rule is gone for gone in rules)]

    @property
    def failing(self) -> bool:
        """Whether every request is answered 503."""
        return _OUT in self._rules

    @failing.setter
    def failing(self, failing: bool) -> None:
        if failing and not self.failing:
            self._rules.insert(0, _OUT)
            self.break_connections()
        elif not failing:
            self.remove(_OUT)

    @property
    def cut(self) -> bool:
        """Whether every connection is broken at once, as by a client that is dead."""
        return self._cut

    @cut.setter
    def cut(self, cut: bool) -> None:
        self._cut = cut
        if cut:
            self.break_connections()

    def break_connections(self) -> None:
        """End what is under way, watches above all."""
        for task in list(self._open):
            self._loop.call_soon_threadsafe(task.cancel)

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

    def show(self, stale: View | None) -> None:
        """Answer lists with this view, and keep watches from it silent, until None is shown: then they catch up."""
        self._stale = stale
        if stale is None:
            self._thawed.set()
        else:
            self._thawed.clear()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        self.opened += 1
        if self._cut:
            return _drop(request)
        watch = request.query.get("watch") in ("true", "1")
        rule = next((rule for rule in self._rules if rule.takes(request.method, request.path, watch)), None)
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
            answer = await rule.fault.before() if rule else None
            if answer is not None:
                self.failures += 1
                return _answered(answer)
            if self._stale is not None and request.method == "GET":
                if watch:
                    await self._thawed.wait()
                elif (body := self._stale.lists.get(request.path_qs)) is not None:
                    return web.Response(body=body, content_type="application/json")
            return await self._forward(request, rule, watch)
        except Dropped:
            return _drop(request)
        finally:
            self._open.discard(task)

    async def _forward(self, request: web.Request, rule: Rule | None, watch: bool) -> web.StreamResponse:
        sent = await request.read()
        if watch:
            async with self._upstream(request, sent) as upstream:
                return await _stream(request, upstream, _end_to_end(upstream.headers), rule)
        # What the API server was asked is done and noted, whether or not the client still listens.
        response = await asyncio.shield(asyncio.create_task(self._exchange(request, sent)))
        if rule:
            await rule.fault.after()
        return response

    async def _exchange(self, request: web.Request, sent: bytes) -> web.Response:
        async with self._upstream(request, sent) as upstream:
            received = await upstream.read()
        whole = "as=Partial" not in request.headers.get("Accept", "")
        if re.fullmatch(WRITE, request.method):
            answer = _json(received)
            self.written.append(Written(request.method, request.path, upstream.status, _json(sent), answer))
            if self.noted:
                await self.noted(self.written[-1])
        elif upstream.status == 200 and "limit" in request.query and whole:
            self.lists[request.path_qs] = received
        return web.Response(status=upstream.status, headers=_end_to_end(upstream.headers), body=received)

    def _upstream(self, request: web.Request, sent: bytes) -> Any:
        """The same request to the API server, as a context manager."""
        return self._session.request(
            request.method,
            self._server + request.path_qs,
            headers=_end_to_end(request.headers),
            data=sent or None,
        )


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in HOP_BY_HOP}


async def _stream(
    request: web.Request, upstream: aiohttp.ClientResponse, headers: dict[str, str], rule: Rule | None
) -> web.StreamResponse:
    """Pass a watch on, line by line."""
    response = web.StreamResponse(status=upstream.status, headers=headers)
    with suppress(aiohttp.ClientConnectionResetError):  # the client has had enough: the end of a watch
        await response.prepare(request)
        lines = aiter(upstream.content)
        async for frame in rule.fault.frames(lines) if rule else lines:
            await response.write(frame)
        await response.write_eof()
    return response


def _json(text: bytes) -> Object:
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _answered(answer: Answer) -> web.Response:
    headers = {} if answer.retry_after is None else {"Retry-After": str(answer.retry_after)}
    return web.json_response(answer.status, status=answer.code, headers=headers)


def _drop(request: web.Request) -> web.StreamResponse:
    """Break the connection; what is returned reaches nobody."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=499)


@asynccontextmanager
async def proxy(kubeconfig: Path, through: Path) -> AsyncIterator[Proxy]:
    """A proxy to the API server of `kubeconfig`; `through` becomes a kubeconfig for going through it."""
    config = yaml.safe_load(await asyncio.to_thread(kubeconfig.read_text))
    cluster = config["clusters"][0]["cluster"]
    trusting = ssl.create_default_context(cafile=cluster["certificate-authority"])
    connector = aiohttp.TCPConnector(ssl=trusting, limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, auto_decompress=True, read_bufsize=2**22
    ) as session:
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
            running.show(None)
            running.break_connections()
            await runner.cleanup()


@contextmanager
def background(kubeconfig: Path, through: Path) -> Iterator[Proxy]:
    """A proxy in a thread of its own."""
    started: list[tuple[Proxy, Callable[[], object]]] = []
    up = threading.Event()

    async def serve() -> None:
        async with proxy(kubeconfig, through) as running:
            done, loop = asyncio.Event(), asyncio.get_running_loop()
            started.append((running, lambda: loop.call_soon_threadsafe(done.set)))
            up.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert up.wait(60)
        yield started[0][0]
    finally:
        for _, end in started:
            end()
        thread.join()
