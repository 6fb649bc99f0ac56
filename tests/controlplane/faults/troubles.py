"""Lives through which something is wrong all the time; at their end nothing may show it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from tests.controlplane.faults.crashes import AT_ONCE, NOT_EVENTS, Crash, Undisturbed, compare
from tests.controlplane.faults.lives import Life, World
from tests.controlplane.faults.proxy import View, Written
from tests.controlplane.faults.rules import (
    ANY,
    READ,
    WRITE,
    Delay,
    DropAfter,
    DropBefore,
    Expire,
    Freeze,
    Hang,
    Object,
    Refuse,
    Rule,
    Swallow,
    Truncate,
)

OUTAGE_SECONDS = 8
T = TypeVar("T")


def _unready(kind: str, event: Object) -> bool:
    """Whatever is between a pod's, Job's or Deployment's beginning and its end."""
    return kind == "MODIFIED"


def _gone(kind: str, event: Object) -> bool:
    return kind == "DELETED"


TROUBLES: dict[str, Callable[[], list[Rule]]] = {
    "every second write is a conflict": lambda: [Rule(Refuse(409, "Conflict"), WRITE, NOT_EVENTS, every=2)],
    "every third request is one too many": lambda: [Rule(Refuse(429, "TooManyRequests", 1), ANY, every=3)],
    "every third write fails": lambda: [Rule(Refuse(500, "InternalError"), WRITE, NOT_EVENTS, every=3)],
    "every second connection breaks before a write": lambda: [Rule(DropBefore(), WRITE, NOT_EVENTS, every=2)],
    "every second connection breaks after a write": lambda: [Rule(DropAfter(), WRITE, NOT_EVENTS, every=2)],
    "every third write hangs": lambda: [Rule(Hang(), WRITE, NOT_EVENTS, every=3, times=3)],
    "writes hang once they are carried out": lambda: [
        Rule(Hang(carried_out=True), WRITE, NOT_EVENTS, every=4, times=3)
    ],
    "every request takes its time": lambda: [Rule(Delay(0.3), ANY)],
    "reads break now and then": lambda: [Rule(DropBefore(), READ, every=3)],
    "watches end in the middle of a frame": lambda: [Rule(Truncate(1), watches=True)],
    "watches are too old again and again": lambda: [Rule(Expire(1), watches=True)],
    "the first watches freeze": lambda: [Rule(Freeze(), watches=True, times=8)],
    "no change is told of": lambda: [Rule(Swallow(_unready), watches=True)],
    "no deletion is told of": lambda: [Rule(Swallow(_gone), watches=True)],
}


async def troubled(world: World, measure: Undisturbed, name: str) -> str:
    """One life with one trouble."""
    rules = TROUBLES[name]()
    async with world.life(start=False) as life:
        life.between.add(*rules)
        await life.start()
        await life.submit(*life.manifests())
        await life.until(life.served, f"{name}: the job completes")
        await life.rest()
        await compare(life, measure, name)
    assert any(rule.hits for rule in rules), f"{name}: nothing was disturbed"
    return name


async def outage(world: World, measure: Undisturbed, number: int) -> str:
    """After some writes the API server fails for a while, and then is refused connections for a while."""
    async with world.life() as life:
        await life.submit(*life.manifests())
        await life.until(lambda: _count(life, number), "so many writes")
        life.between.failing = True
        await asyncio.sleep(OUTAGE_SECONDS)
        life.between.failing = False
        life.between.cut = True
        await asyncio.sleep(OUTAGE_SECONDS)
        life.between.cut = False
        await life.until(life.served, "the job completes")
        await life.rest()
        await compare(life, measure, f"outage after write {number}")
    return f"outage after write {number}"


async def stale(world: World, measure: Undisturbed, point: Crash, behind: int) -> str:
    """A crash, and a restart whose lists and watches show the cluster as it was some writes before."""
    async with world.life(start=False) as life:
        views = record(life)
        await life.start()
        await life.submit(*life.manifests())
        hang = Hang(carried_out=point.carried_out)
        life.between.add(Rule(hang, WRITE, NOT_EVENTS, skip=point.number - 1, times=1))
        await asyncio.wait_for(hang.reached.wait(), 120)
        life.between.noted = None
        await life.die()
        life.between.show(views[max(0, len(views) - 1 - behind)])
        await life.start()
        await asyncio.sleep(3)
        life.between.show(None)
        await life.until(life.served, "the job completes")
        await life.rest()
        await compare(life, measure, f"{point}, then a view of {behind} writes before")
    return f"{point} - {behind}"


async def late(world: World, measure: Undisturbed, first: int, every: int) -> int:
    """One life to its end; then a restart on every so manieth view of it may change nothing. How many restarts."""
    async with world.life(start=False) as life:
        views = record(life)
        await life.start()
        await life.submit(*life.manifests())
        await life.until(life.served, "the job completes")
        await life.rest()
        life.between.noted = None
        for number, view in list(enumerate(views, 1))[first::every]:
            await life.die()
            life.between.show(view)
            await life.start()
            await asyncio.sleep(1.5)
            # How many pods are ready is what the view says; nothing else may follow from it.
            await compare(life, measure, f"a restart on the view after {number} writes", but="ModelEndpoint")
            life.between.show(None)
            await life.until(life.served, "the endpoints are known to be ready again")
            await life.rest()
            await compare(life, measure, f"after the view after {number} writes")
    return len(views[first::every])


def record(life: Life) -> list[View]:
    """Fills with what lists answer right after each write of the operator."""
    views: list[View] = []

    async def take(written: Written) -> None:
        if "/events" not in written.path:
            views.append(await life.view())

    life.between.noted = take
    return views


async def _count(life: Life, number: int) -> bool:
    return len(life.writes()) >= number


async def side_by_side(lives: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Lead lives, `AT_ONCE` at a time; what they return."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(life: Callable[[], Awaitable[T]]) -> T:
        async with places:
            return await life()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(life)) for life in lives]
    return [task.result() for task in tasks]
