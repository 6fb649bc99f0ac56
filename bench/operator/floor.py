"""The floor: a bare loop makes the operator's very writes, recorded from one job, as fast as the server takes them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.operator.audit import OPERATOR
from bench.operator.workload import at_once, submit

from trimtab_operator.core.api_server import ApiServer
from trimtab_operator.core.kube import Object

_FIRST_ERROR = 400


@dataclass(frozen=True)
class Recorded:
    """One write: its method of `Kube`, its body, its field manager."""

    method: str
    body: Object
    manager: str


@dataclass(frozen=True)
class Recording:
    """The writes of one job's life, in order."""

    name: str
    uid: str
    writes: tuple[Recorded, ...]

    @property
    def children(self) -> int:
        """How many writes until the first children exist and the status tells of them."""
        return 1 + next(
            index
            for index, write in enumerate(self.writes)
            if write.method == "apply_status" and "jobUID" in write.body["status"].get("prepare", {})
        )

    def until_children(self) -> Recording:
        """The first of the writes only: until the first children exist and the status tells of them."""
        return replace(self, writes=self.writes[: self.children])

    def of(self, name: str, uid: str) -> list[Recorded]:
        """The same writes for another job."""
        text = json.dumps([write.body for write in self.writes])
        bodies = json.loads(text.replace(self.uid, uid).replace(self.name, name))
        return [Recorded(write.method, body, write.manager) for write, body in zip(self.writes, bodies, strict=True)]


def record(events: Sequence[dict[str, Any]], name: str, uid: str) -> Recording:
    """From the audit log, request bodies included, of a run with one job."""
    found = []
    for event in events:
        if event["user"]["username"] != OPERATOR or event["verb"] not in ("create", "patch"):
            continue
        if event["objectRef"]["resource"] == "leases" or event["responseStatus"]["code"] >= _FIRST_ERROR:
            continue
        status = event["objectRef"].get("subresource") == "status"
        method = "create" if event["verb"] == "create" else "apply_status" if status else "apply"
        manager = dict(part.split("=") for part in event["requestURI"].partition("?")[2].split("&"))["fieldManager"]
        found.append((event["requestReceivedTimestamp"], Recorded(method, event["requestObject"], manager)))
    return Recording(name, uid, tuple(write for _, write in sorted(found, key=lambda each: each[0])))


@dataclass(frozen=True)
class Floor:
    """How long the bare loop took, in seconds."""

    children: float
    """Until every job's first children existed and its status told of them."""
    whole: float
    """Until every write of every job's life was made."""
    writes: int


async def play(user: ApiServer, operator: ApiServer, recording: Recording, names: Sequence[str]) -> Floor:
    """Create the jobs and make all their writes, in two laps: the first children of every job, then the rest."""
    left: dict[str, list[Recorded]] = {}
    versions: dict[str, str] = {}
    split = recording.children

    async def write(name: str, each: Recorded) -> None:
        body = each.body
        if each.method == "apply_status":
            body["metadata"]["resourceVersion"] = versions[name]
        answer = await getattr(operator, each.method)(body, manager=each.manager)
        if each.method == "apply_status":
            versions[name] = answer["metadata"]["resourceVersion"]

    made: asyncio.Queue[Object] = asyncio.Queue()

    async def create(name: str) -> None:
        made.put_nowait(await submit(user, name))

    async def first() -> None:
        job = await made.get()
        name = job["metadata"]["name"]
        versions[name] = job["metadata"]["resourceVersion"]
        writes = recording.of(name, job["metadata"]["uid"])
        left[name] = writes[split:]
        for each in writes[:split]:
            await write(name, each)

    async def rest(name: str) -> None:
        for each in left.pop(name):
            await write(name, each)

    began = time.monotonic()
    await asyncio.gather(at_once([partial(create, name) for name in names]), at_once([first] * len(names)))
    children = time.monotonic() - began
    await at_once([partial(rest, name) for name in names])
    return Floor(children, time.monotonic() - began, len(recording.writes) * len(names))
