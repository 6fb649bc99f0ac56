"""Events: each text once, within the API's bounds, and never anyone's failure."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from tests.unit.core.toys import World, world

from trimtab_operator.core.actions import EventNote, EventType
from trimtab_operator.core.errors import Forbidden
from trimtab_operator.core.events import EventRecorder, event_for
from trimtab_operator.core.kube import EVENT, Ref

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
NOTE = EventNote(EventType.WARNING, "Failed", "no space left")


@asynccontextmanager
async def recorder(here: World) -> AsyncIterator[EventRecorder]:
    events = EventRecorder(here.kube, "pod-1", lambda: NOW)
    running = asyncio.create_task(events.run())
    yield events
    await events.drain()
    running.cancel()


async def test_the_same_words_are_written_once(tmp_path: Path) -> None:
    here = world(tmp_path)
    owner = await here.submit()
    other = EventNote(EventType.WARNING, "Failed", "no memory left")
    for _ in range(2):  # the second one after a restart, with an empty memory
        async with recorder(here) as events:
            for _ in range(3):
                events.emit(owner, (NOTE, other))
    assert len(here.kube.writes) == 4
    assert sorted(event["note"] for event in here.local.select(EVENT)) == ["no memory left", "no space left"]


async def test_a_refused_event_is_only_logged(tmp_path: Path) -> None:
    here = world(tmp_path)
    owner = await here.submit()

    def refuse(verb: str, ref: Ref) -> None:
        here.kube.before = lambda verb, ref: None
        raise Forbidden(403, "Forbidden", "not yours")

    here.kube.before = refuse
    async with recorder(here) as events:
        events.emit(owner, (NOTE,))
        events.emit(owner, (EventNote(EventType.NORMAL, "Next", "goes on"),))
    assert [event["reason"] for event in here.local.select(EVENT)] == ["Next"]


async def test_bounds(tmp_path: Path) -> None:
    owner = await world(tmp_path).submit()
    owner["metadata"]["name"] = "n" * 253
    long = event_for(owner, EventNote(EventType.NORMAL, "R", "ü" * 5000), "i", NOW)
    assert len(long["note"].encode()) <= 1024
    assert len(long["metadata"]["name"]) <= 253
    event = event_for(owner, NOTE, "i", NOW)
    assert event["eventTime"] == "2026-01-02T03:04:05.000006Z"
    assert event["metadata"]["namespace"] == event["regarding"]["namespace"] == "default"
    assert event["type"] == "Warning"
