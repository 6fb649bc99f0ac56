"""The pure plan, breadth first over the states that a small job gets into by its plans, its pods, people and crashes.

A state is the whole cluster; two that differ in time, uids and versions only are one. How many are visited is bounded;
`make test-faults` visits more.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.unit.faults.history import attempt_of, record_of
from tests.unit.finetunejob.world import Crash, World, spec, stage

STATES = int(os.environ.get("TRIMTAB_STATES", "150"))
"""Visited of each spec, at most; below 100,000."""
ENDED = ("Succeeded", "Failed")
_UNIQUE = re.compile(r"[0-9a-f]{8}-uid|-[0-9a-f]{8}\b|\b[0-9a-f]{8}\b|\d{4}-\d\d-\d\dT[\d:]+Z")
SPECS = {
    "one stage": spec(stage(retries=1)),
    "two nodes": spec(stage(nodes=2, retries=0)),
    "two stages": spec(stage("first", retries=0), stage("end", source="first", retries=0)),
}
Step = tuple[str, Callable[[World], None]]


def steps(world: World) -> Iterator[Step]:
    """All that may happen next."""
    yield "plan", _plan
    for writes in range(3):
        yield f"crash after {writes} writes", lambda w, n=writes: _crash(w, n)  # type: ignore[misc]
    yield "a write is refused", lambda w: w.refuse()
    yield "time", lambda w: w.sleep(400)
    yield "suspend or resume", lambda w: w.edit(suspend=not w.owner["spec"]["suspend"])
    for index, pod in enumerate(world.pods()):
        if pod["status"]["phase"] != "Running":
            continue
        codes = [75] if "deletionTimestamp" in pod["metadata"] else [0, 71, 65]
        for code in codes:
            yield f"pod {index} ends with {code}", lambda w, i=index, c=code: _end(w, i, c)  # type: ignore[misc]
        yield f"pod {index} is evicted", lambda w, i=index: w.end(w.pods()[i], 143, disrupted=True)  # type: ignore[misc]
    for index, _ in enumerate(world.jobs()):
        yield f"job {index} is deleted", lambda w, i=index: w.remove(w.jobs()[i])  # type: ignore[misc]


def _plan(world: World) -> None:
    world.reconcile()


def _crash(world: World, writes: int) -> None:
    with contextlib.suppress(Crash):
        world.reconcile(crash_after=writes)


def _end(world: World, index: int, code: int) -> None:
    pod = world.pods()[index]
    role = pod["metadata"]["labels"].get("trimtab.dev/stage", "prepare")
    world.end(pod, code, "" if code else world.report(role))


def shape(world: World) -> str:
    """What two alike states have in common."""
    objects = [[str(ref), _lean(obj)] for ref, obj in sorted(world.objects.items()) if ref.kind in _KEPT]
    known: dict[str, str] = {}
    return _UNIQUE.sub(
        lambda m: known.setdefault(m[0], f"#{len(known)}") if "T" not in m[0] else "", json.dumps(objects)
    )


_KEPT = ("FineTuneJob", "Job", "Pod")
_DROPPED = {
    *("resourceVersion", "generation", "observedGeneration", "activeSeconds", "activeSince"),
    *("template", "message", "conditions"),
}


def _lean(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _lean(each) for key, each in value.items() if key not in _DROPPED}
        held = [c["type"] for c in value.get("conditions", []) if c.get("status") == "True"]
        return {**kept, **({"held": held} if held else {})}
    return [_lean(each) for each in value] if isinstance(value, list) else value


def check(world: World, what: str) -> None:
    """What holds in every state."""
    for role in {job["metadata"]["labels"].get("trimtab.dev/stage", "prepare") for job in world.jobs()}:
        assert len(world.jobs(role)) == 1, what
        owners = {pod["metadata"]["ownerReferences"][0]["uid"] for pod in world.pods(role)}
        assert owners <= {world.jobs(role)[0]["metadata"]["uid"]}, f"{what}: two attempts live at once"
    for job, owner in zip(world.created, world.owner_at_creation, strict=True):
        recorded = record_of(owner.get("status", {}), job["metadata"]["labels"].get("trimtab.dev/stage", ""))
        assert recorded.get("attempt") == attempt_of(job), f"{what}: a Job whose number is not recorded"
        assert "jobUID" not in recorded, f"{what}: a number that is used up"
    numbers: dict[tuple[str, str], str] = {}
    for status in world.status_writes:
        for record in (*status.get("stages", []), {"name": "", **status.get("prepare", {})}):
            if "jobUID" in record:
                key = (record["name"], str(record["attempt"]))
                assert numbers.setdefault(key, record["jobUID"]) == record["jobUID"], f"{what}: a number used twice"
    ended = [s for s in world.status_writes if s["phase"] in ENDED]
    assert all(s["phase"] == ended[0]["phase"] for s in ended), f"{what}: what has ended stays so"


@pytest.mark.parametrize("name", SPECS)
def test_no_state_breaks_a_promise(name: str, counted: Callable[[str, int], None]) -> None:
    first = World(copy.deepcopy(SPECS[name]))
    seen, waiting, transitions = {shape(first)}, deque([first]), 0
    while waiting and len(seen) < STATES:
        world = waiting.popleft()
        for what, step in steps(world):
            after = fork(world)
            step(after)
            transitions += 1
            check(after, what)
            if (found := shape(after)) not in seen:
                seen.add(found)
                waiting.append(after)
    counted(f"states of {name}, by {transitions} transitions", len(seen))


def fork(world: World) -> World:
    """A copy as deep as what the world changes in place."""
    after = copy.copy(world)
    after.objects = {
        ref: {key: dict(value) if isinstance(value, dict) else value for key, value in obj.items()}
        for ref, obj in world.objects.items()
    }
    after._uids = copy.copy(world._uids)
    for kept in ("status_writes", "created", "owner_at_creation"):
        setattr(after, kept, list(getattr(world, kept)))
    return after
