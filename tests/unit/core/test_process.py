"""What surrounds the loop: kopf's feed and patience, probes, logging, the request rate."""

import asyncio
import io
import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.core.toys import world

from trimtab_operator.core.actions import Delete
from trimtab_operator.core.apply import carry_out
from trimtab_operator.core.kube import CONFIGMAP, Change
from trimtab_operator.core.log import configure
from trimtab_operator.core.metrics import Metrics
from trimtab_operator.core.probes import serve
from trimtab_operator.core.rate import TokenBucket
from trimtab_operator.core.store import Store
from trimtab_operator.main import EndlessBackoffs, KopfFeed, NoMemories, session


def test_kopf_never_gives_up() -> None:
    backoffs = EndlessBackoffs()
    for _ in range(2):  # kopf iterates anew for each request
        delays = list(itertools.islice(backoffs, 1000))
        assert len(delays) == 1000
        assert delays[0] < 2
        assert 7 < max(delays) <= 12


async def test_the_feed_completes_and_translates_what_kopf_brings() -> None:
    relisted: list[None] = []
    feed = KopfFeed(lambda: relisted.append(None), 2)
    seen: list[Any] = []
    feed.subscribe(lambda change, obj: seen.append((change, obj)))

    def bring() -> None:
        for event_type in ("ADDED", "MODIFIED", "DELETED"):
            feed.take(CONFIGMAP, event_type, {"metadata": {"name": "a"}})
        for _ in range(3):
            feed.listed()

    await asyncio.to_thread(bring)
    await asyncio.sleep(0)
    obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}
    assert seen == [(change, obj) for change in (Change.UPSERT, Change.UPSERT, Change.DELETE)]
    assert len(relisted) == 1


class Nobody:
    """Credentials of a server without TLS that asks for none."""

    server = "http://127.0.0.1"
    proxy = None

    async def authorization(self) -> None:
        return None


async def test_kopf_gets_the_version_of_a_list_and_nothing_to_hold() -> None:
    answers = {
        "/pods": {"kind": "PodList", "metadata": {"resourceVersion": "7", "continue": "x"}, "items": [{"kind": "Pod"}]},
        "/api": {"kind": "APIResourceList", "resources": [{"name": "pods"}]},
    }
    app = web.Application()
    for path, answer in answers.items():
        app.router.add_get(path, lambda _, answer=answer: web.json_response(answer))
    listed: list[None] = []
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with await session(Nobody(), lambda: listed.append(None)) as client:  # type: ignore[arg-type]

            async def ask(path: str) -> Any:
                async with client.get(f"http://127.0.0.1:{runner.addresses[0][1]}{path}") as answer:
                    return await answer.json()

            assert await ask("/api") == answers["/api"]
            assert listed == []
            assert await ask("/pods") == {"kind": "PodList", "metadata": {"resourceVersion": "7"}, "items": []}
            assert len(listed) == 1
    finally:
        await runner.cleanup()


async def test_kopf_remembers_no_object() -> None:
    memories = NoMemories()
    await memories.recall({"metadata": {"uid": "u"}}, noticed_by_listing=True)
    assert list(memories.iter_all_memories()) == []


async def test_the_feed_loses_nothing_between_threads() -> None:
    """Also where a sink fails, and while both threads are at it."""
    feed = KopfFeed()
    seen: list[int] = []
    complete = asyncio.Event()

    def take(_: Change, obj: Any) -> None:
        seen.append(obj["metadata"]["number"])
        if len(seen) == 20_000:
            complete.set()
        if seen[-1] % 100 == 0:
            raise ZeroDivisionError

    feed.subscribe(take)

    def bring() -> None:
        for number in range(20_000):
            feed.take(CONFIGMAP, "ADDED", {"metadata": {"number": number}})

    await asyncio.to_thread(bring)
    await asyncio.wait_for(complete.wait(), 60)
    assert seen == list(range(20_000))


async def test_probes_tell_the_truth() -> None:
    cause: str | None = None
    ready = False
    metrics = Metrics()
    metrics.observe_request("GET", 200)
    async with (
        serve(0, metrics, unhealthy=lambda: cause, ready=lambda: ready, host="127.0.0.1") as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):

        async def ask(path: str) -> tuple[int, str]:
            async with session.get(path) as answer:
                return answer.status, await answer.text()

        assert await ask("/healthz") == (200, "ok")
        assert (await ask("/readyz"))[0] == 503
        cause, ready = "stuck", True
        assert await ask("/healthz") == (503, "stuck")
        assert (await ask("/readyz"))[0] == 200
        families = {family.name for family in text_string_to_metric_families((await ask("/metrics"))[1])}
        assert "trimtab_operator_api_requests" in families


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("root_logger")
def test_log_lines_are_json_and_name_the_object() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    with structlog.contextvars.bound_contextvars(kind="FineTuneJob", namespace="n", name="a"):
        structlog.stdlib.get_logger("ours").warning("refused", reason="Invalid")
        logging.getLogger("theirs").error("hello %s", "you")
    ours, theirs = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (ours["event"], ours["reason"], ours["level"], ours["logger"]) == ("refused", "Invalid", "warning", "ours")
    assert (ours["kind"], ours["namespace"], ours["name"]) == ("FineTuneJob", "n", "a")
    assert (theirs["event"], theirs["name"]) == ("hello you", "a")


async def test_the_rate_is_kept_after_the_burst() -> None:
    bucket = TokenBucket(rate=1000, burst=5)
    start = time.monotonic()
    await asyncio.gather(*(bucket.take() for _ in range(25)))
    assert time.monotonic() - start >= 0.019


async def test_a_deletion_is_known_without_any_event(tmp_path: Path) -> None:
    here = world(tmp_path)
    metadata = {"name": "a", "namespace": "default"}
    made = await here.local.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}, manager="m")
    store = Store()
    store.upsert(made)

    def deliver(change: Change, obj: Any) -> None:
        (store.upsert if change is Change.UPSERT else store.remove)(obj)

    delete = Delete(CONFIGMAP, "default", "a", made["metadata"]["uid"], made["metadata"]["resourceVersion"])
    assert await carry_out(delete, here.kube, store, deliver)
    assert store.all_of(CONFIGMAP) == []
    assert not store.upsert(made)  # a late event
