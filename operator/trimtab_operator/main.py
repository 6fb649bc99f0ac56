"""kopf's part: credentials and watches. Its handlers feed the runtime, and it lives in a thread of its own.

kopf ends for good where one watch brings an error or a broken frame. Its own loop makes that harmless: what it leaves
behind ends with it, store and workers go on in theirs, and kopf is begun anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import kopf
import structlog
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory

from trimtab_operator.core import credentials
from trimtab_operator.core.kube import CHILDREN, Change, Kind, Object, Sink
from trimtab_operator.core.runtime import CHILD_LABELS, WATCHED

_BATCH = 100
"""Events that are delivered before the loop may do something else."""
_LONGEST_PAUSE_SECONDS = 30.0
_STEADY_SECONDS = 60.0
"""Having lived so long, kopf is begun anew without delay."""
_STOP_SECONDS = 10.0
_END_SECONDS = 2.0
"""For kopf's tasks to end when they are cancelled; what does not is left behind with its loop."""

log = structlog.stdlib.get_logger(__name__)


class EndlessBackoffs:
    """Seconds between two tries of kopf's own requests: it never gives up, however long an outage is."""

    def __iter__(self) -> Iterator[float]:
        """A new run for each request: 1, 2, 4, 8, then about 10 for ever."""
        delay = 1.0
        while True:
            yield delay * random.uniform(0.8, 1.2)  # noqa: S311
            delay = min(delay * 2, 10.0)


class KopfFeed:
    """`Feed` of what kopf's watches bring, from kopf's thread to the loop that made this object."""

    def __init__(self, relisted: Callable[[], None] = lambda: None, lists: int = 0) -> None:
        """How it begins and begins anew.

        Args:
            relisted: Called in the loop when a kind is listed again: then changes may have been missed before.
            lists: How many lists come first.
        """
        self._relisted = relisted
        self._unlisted = lists
        self._listening = asyncio.Event()
        self._sinks: list[Sink] = []
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Kind, str, Object]] = deque()

    def subscribe(self, sink: Sink) -> None:
        """Deliver every later event to `sink`."""
        self._sinks.append(sink)

    def listed(self) -> None:
        """Kopf has listed a kind, in its thread; its watch tells of all that comes after."""
        self._loop.call_soon_threadsafe(self._count)

    async def listening(self) -> None:
        """Wait until every watch has begun: nothing is missed from then on."""
        await self._listening.wait()

    def take(self, kind: Kind, event_type: str, obj: Object) -> None:
        """Pass on one raw event of a watch, in kopf's thread."""
        self._waiting.append((kind, event_type, obj))
        if len(self._waiting) == 1:  # else the loop has been called and comes
            self._loop.call_soon_threadsafe(self._deliver)

    def _count(self) -> None:
        if self._listening.is_set():
            self._relisted()
        self._unlisted -= 1
        if self._unlisted <= 0:
            self._listening.set()

    def _deliver(self) -> None:
        for _ in range(_BATCH):
            if not self._waiting:
                return
            # Taken out when it is done: until then, nobody calls the loop again.
            kind, event_type, obj = self._waiting[0]
            change = Change.DELETE if event_type == "DELETED" else Change.UPSERT
            try:
                for sink in self._sinks:
                    sink(change, {**obj, "apiVersion": kind.api_version, "kind": kind.kind})
            except Exception:  # whatever one object does to us, the others go on
                log.exception("an event was not taken", kind=kind.kind)
            self._waiting.popleft()
        if self._waiting:
            self._loop.call_soon(self._deliver)


class Watches:
    """kopf in its thread, begun anew whenever it ends."""

    def __init__(self, feed: KopfFeed, namespaces: tuple[str, ...], restarted: Callable[[], None]) -> None:
        """`namespaces`: empty for all; `restarted` is called, in kopf's thread, each time kopf has ended by itself."""
        self._feed = feed
        self._namespaces = namespaces
        self._restarted = restarted
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        # It tells that signals are ignored outside the main thread, and that it was told to stop: both are meant so.
        logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
        self._thread.start()

    async def stop(self) -> None:
        """End the watches; one that does not end in time ends with the process."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, _STOP_SECONDS)

    def _run(self) -> None:
        delay = 1.0
        while not self._stop.is_set():
            begun = time.monotonic()
            error = self._live()
            if self._stop.is_set():
                return
            if time.monotonic() - begun > _STEADY_SECONDS:
                delay = 1.0
            log.error("the watches ended and begin anew", error=repr(error), in_seconds=round(delay, 1))
            self._restarted()
            self._stop.wait(delay * random.uniform(0.8, 1.2))  # noqa: S311
            delay = min(delay * 2, _LONGEST_PAUSE_SECONDS)

    def _live(self) -> BaseException | None:
        """Kopf from its beginning to its end, in a loop of its own; what ended it."""
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._watch())
        except (Exception, asyncio.CancelledError) as error:  # whatever it was, the watches must go on
            return error
        finally:
            loop.set_exception_handler(lambda *_: None)  # it would tell of each task that is left behind
            loop.close()
        return None

    async def _watch(self) -> None:
        tasks = await kopf.spawn_tasks(
            registry=_registry(self._feed),
            settings=_settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # Not `kopf.run_tasks`: once a watch has failed it may wait for the others without end.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_END_SECONDS)
        for task in done:
            task.result()


def _settings() -> kopf.OperatorSettings:
    """Bounds on what kopf would do without bounds."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.queueing.idle_timeout = 0.05
    settings.queueing.worker_limit = 64
    settings.watching.server_timeout = 300
    settings.watching.chunk_size = 1  # see `session`
    settings.persistence.diffbase_storage = _NoHistory()
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = EndlessBackoffs()
    settings.process.ultimate_exiting_timeout = None
    selector = ",".join(f"{label}={value}" for label, value in CHILD_LABELS.items())
    for kind in CHILDREN:
        group, _sep, version = kind.api_version.rpartition("/")
        settings.watching.label_selectors[group, version, kind.plural] = selector
    return settings


def _registry(feed: KopfFeed) -> kopf.OperatorRegistry:
    """The handlers: one for the credentials, one for each kind."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        """The same credentials as the runtime's; asked again when the API server refuses them."""
        found = await credentials.load()
        return kopf.AiohttpSession(server=found.server, aiohttp_session=await session(found, feed.listed))

    for kind in WATCHED:
        _watch(kind, feed, registry)
    return registry


async def session(found: credentials.Credentials, listed: Callable[[], None]) -> aiohttp.ClientSession:
    """Kopf's own, save that a list has no items.

    Kopf needs its version alone, from which it watches on. The runtime makes its own lists, which it can keep small in
    memory; kopf would hold every object of every kind until its handlers have seen them.
    """

    class Unread(aiohttp.ClientResponse):
        async def json(self, **options: Any) -> Any:
            answer = await super().json(**options)
            if isinstance(answer, dict) and "items" in answer:
                listed()
                answer["items"] = []
                answer["metadata"].pop("continue", None)
            return answer

    secure = found.server.startswith("https:")
    authorization = await found.authorization()
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=found.ssl_context() if secure else True),
        headers={"Authorization": authorization} if authorization else {},
        proxy=found.proxy,
        response_class=Unread,
    )


class NoMemories(ResourceMemories):
    """No handler of ours keeps anything: kopf need not remember each object that it has seen."""

    async def recall(self, raw_body: kopf.RawBody, **options: Any) -> ResourceMemory:
        """A new one each time."""
        return await super().recall(raw_body, **{**options, "ephemeral": True})


class _NoHistory(kopf.DiffBaseStorage):
    """Nobody asks kopf what has changed: it need not copy each object to find out, nor remember any."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        return


def _watch(kind: Kind, feed: KopfFeed, registry: kopf.OperatorRegistry) -> None:
    group, _sep, version = kind.api_version.rpartition("/")

    @kopf.on.event(group, version, kind.plural, registry=registry)
    async def take(event: kopf.RawEvent, **_: Any) -> None:
        feed.take(kind, str(event["type"]), dict(event["object"]))
