"""Each field of a spec is changed, set to its bounds, given what it can't take, removed and restored."""

from __future__ import annotations

import copy
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.controlplane.faults.fields import Leaf, Schema, leaves, put, without
from tests.controlplane.faults.outcomes import (
    Outcome,
    endpoint_world,
    job_world,
    outcome_of,
    settle,
    state,
)

from trimtab_operator.core.kube import Object

Admit = Callable[[Object, Object | None], Awaitable[Object | str]]
"""Takes an object, and what it replaces: the object as the API server would store it, or its refusal."""


@dataclass
class Findings:
    """What the sweep saw.

    Attributes:
        cases: How many specs were tried.
        idle: Fields of which no two values differ in what comes of them.
        taken: Values that should have been refused.
        mute: Refusals that do not name the field.
        unset: Fields of which no value was accepted, with the last refusal.
        lasting: Fields that, changed and changed back, leave something else.
    """

    cases: int = 0
    idle: set[str] = field(default_factory=set)
    taken: list[str] = field(default_factory=list)
    mute: list[str] = field(default_factory=list)
    unset: dict[str, str] = field(default_factory=dict)
    lasting: list[str] = field(default_factory=list)


class Sweep:
    """The sweep of one kind."""

    def __init__(self, schema: Schema, bases: list[Object], admit: Admit) -> None:
        """`bases`: valid objects; between them every field can be set."""
        self._schema = schema
        self._bases = bases
        self._admit = admit
        self._known: dict[str, Outcome] = {}
        self.found = Findings()

    async def run(self, step: int = 1) -> Findings:
        """All fields, or every so manieth."""
        for leaf in list(leaves(self._schema))[::step]:
            await self._sweep(leaf)
        return self.found

    async def _sweep(self, leaf: Leaf) -> None:
        base, accepted = await self._accepted(leaf)
        if base is None:
            return
        await self._refused(leaf, base)
        outcomes = [self._outcome(obj) for obj in accepted]
        if all(outcome == outcomes[0] for outcome in outcomes):
            self.found.idle.add(leaf.place)
        await self._restored(leaf, accepted)

    async def _accepted(self, leaf: Leaf) -> tuple[Object | None, list[Object]]:
        """The base on which most values of the field are valid, and the objects with these; the last is without."""
        best: tuple[Object | None, list[Object]] = None, []
        for base in self._bases:
            answers = [await self._ask(changed(base, self._schema, leaf, value)) for value in leaf.samples()]
            taken = [answer for answer in answers if not isinstance(answer, str)]
            if len(taken) > len(best[1]):
                best = base, taken
            if len(taken) == len(answers):
                break
            self.found.unset[leaf.place] = next(answer for answer in answers if isinstance(answer, str))
        base, taken = best
        if base is not None:
            self.found.unset.pop(leaf.place, None)
            bare = {**base, "spec": without(taken[0]["spec"], leaf.path)}
            removed = await self._ask(bare)
            if not isinstance(removed, str):
                taken.append(removed)
            elif leaf.name not in removed:
                self.found.mute.append(f"{leaf} removed: {removed}")
        return base, taken

    async def _refused(self, leaf: Leaf, base: Object) -> None:
        for value in leaf.wrong():
            answer = await self._ask(changed(base, self._schema, leaf, value))
            if not isinstance(answer, str):
                self.found.taken.append(f"{leaf}: {str(value)[:40]!r}")
            elif leaf.name not in answer:
                self.found.mute.append(f"{leaf} {str(value)[:40]!r}: {answer}")

    async def _restored(self, leaf: Leaf, accepted: list[Object]) -> None:
        """An edit is refused with the field's name, or it changes what is there and can be taken back."""
        first, second = accepted[0], accepted[1 % len(accepted)]
        answer = await self._admit(second, first)
        self.found.cases += 1
        if isinstance(answer, str):
            if not any(str(part) in answer for part in leaf.path if part != -1):
                self.found.mute.append(f"{leaf} edited: {answer}")
            return
        before, after = round_trip(first, second)
        if before != after:
            self.found.lasting.append(str(leaf))

    async def _ask(self, obj: Object) -> Object | str:
        self.found.cases += 1
        return await self._admit(obj, None)

    def _outcome(self, obj: Object) -> Outcome:
        key = json.dumps(obj["spec"], sort_keys=True)
        if key not in self._known:
            self._known[key] = outcome_of(obj)
        return self._known[key]


def changed(base: Object, schema: Schema, leaf: Leaf, value: Any) -> Object:
    """The base with another value of the field."""
    return {**copy.deepcopy(base), "spec": put(base["spec"], schema, leaf.path, value)}


def round_trip(first: Object, second: Object) -> tuple[Outcome, Outcome]:
    """What is there at rest before the spec is changed and after it is changed back, in the middle of its life."""
    if first["kind"] == "ModelEndpoint":
        world = endpoint_world(first)
        before = state(world)
        for spec in (second["spec"], first["spec"]):
            world.edit(**spec)
            settle(world)
        return before, state(world)
    job = job_world(first)
    job.settle()
    before = state(job)
    for spec in (second["spec"], first["spec"]):
        job.edit(**spec)
        job.settle()
    return before, state(job)
