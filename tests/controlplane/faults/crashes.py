"""A crash right before and right after each write of a job's life must leave what an undisturbed life leaves."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.controlplane.faults.lives import Life, World
from tests.controlplane.faults.rules import WRITE, Hang, Rule

AT_ONCE = 12
"""Lives side by side: more only wait for the machine."""
NOT_EVENTS = "^(?!.*/events)"
"""Events are told beside the work, and one that is lost is not told again."""


@dataclass(frozen=True)
class Crash:
    """The operator dies at its n-th write, counted from 1."""

    number: int
    carried_out: bool
    """The API server has done what was asked; the operator does not hear of it."""

    def __str__(self) -> str:
        return f"{'after' if self.carried_out else 'before'} write {self.number}"


@dataclass(frozen=True)
class Undisturbed:
    """What a life without faults does and leaves."""

    writes: int
    created: dict[str, int]
    deleted: dict[str, int]
    remains: dict[str, Any]


async def undisturbed(world: World) -> Undisturbed:
    """The measure of all others."""
    async with world.life() as life:
        await life.submit(*life.manifests())
        await life.until(life.served, "the job completes")
        await life.rest()
        result = Undisturbed(len(life.writes()), dict(life.created()), dict(life.deleted()), await life.remains())
    assert set(result.created.values()) == {1}
    return result


async def crash(world: World, measure: Undisturbed, point: Crash) -> tuple[Crash, str]:
    """One life with a crash; the write at which it came, empty where the life has no so manieth write.

    Raises:
        AssertionError: It leaves something else than an undisturbed life.
    """
    hang = Hang(carried_out=point.carried_out)
    async with world.life() as life:
        life.between.add(Rule(hang, WRITE, NOT_EVENTS, skip=point.number - 1, times=1))
        await life.submit(*life.manifests())
        reached = asyncio.create_task(hang.reached.wait())
        ended = asyncio.create_task(life.until(life.served, "the job completes, or the crash comes"))
        await asyncio.wait((reached, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        where = ""
        if hang.reached.is_set():
            await life.die()
            where = str(life.between.written[-1]) if life.between.written else "nothing yet"
            await life.start()
        reached.cancel()
        await life.until(life.served, "the job completes")
        await life.rest()
        await compare(life, measure, str(point))
    return point, where


async def compare(life: Life, measure: Undisturbed, what: str, but: str = "nothing") -> None:
    """Raise AssertionError where a life at rest has left something else; `but`: a kind that is not looked at."""
    assert dict(life.created()) == measure.created, f"{what}: other Jobs were created\n{life.story()}"
    assert dict(life.deleted()) == measure.deleted, f"{what}: other objects were deleted\n{life.story()}"
    remains = await life.remains()
    assert remains.keys() == measure.remains.keys(), f"{what}: other objects remain\n{life.story()}"
    for name, expected in measure.remains.items():
        if name.startswith(but):
            continue
        differing = "\n".join(
            difflib.unified_diff(_lines(expected), _lines(remains[name]), "undisturbed", "found", n=2)
        )
        assert not differing, f"{what}: {name} is another\n{differing}\n{life.story()}"


def _lines(obj: Any) -> list[str]:
    return json.dumps(obj, indent=1, sort_keys=True).splitlines()


async def sweep(world: World, measure: Undisturbed, points: Iterable[Crash]) -> list[tuple[Crash, str]]:
    """Many crashes, each in a life of its own, `AT_ONCE` side by side."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(point: Crash) -> tuple[Crash, str]:
        async with places:
            return await crash(world, measure, point)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(point)) for point in points]
    return [task.result() for task in tasks]


def every_crash(writes: int) -> list[Crash]:
    """Before and after each write."""
    return [Crash(number, carried_out) for number in range(1, writes + 1) for carried_out in (False, True)]
