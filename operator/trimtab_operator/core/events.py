"""Kubernetes Events about owners: each text once, written beside the hot path, worth no failure."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from trimtab_operator.core.actions import EventNote
from trimtab_operator.core.conditions import shorten
from trimtab_operator.core.errors import AlreadyExists, KubeError
from trimtab_operator.core.kube import EVENT, Kube, Object
from trimtab_operator.core.names import MANAGER

MAX_NOTE = 1024
MAX_NAME = 253
_REMEMBERED = 20_000
_WAITING = 50_000
"""About 600 bytes each: all of 10,000 jobs that start together."""

log = structlog.stdlib.get_logger(__name__)


class EventRecorder:
    """Takes Events at once and writes them in `run`, one after the other.

    In a burst they come late, with the time at which they arose: what thousands of jobs wait for goes before what is
    said of them.
    """

    def __init__(self, kube: Kube, instance: str, now: Callable[[], datetime]) -> None:
        self._kube = kube
        self._instance = shorten(instance or MANAGER, 128)
        self._now = now
        self._seen: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        self._queue: asyncio.Queue[tuple[Object, EventNote, datetime]] = asyncio.Queue(maxsize=_WAITING)

    def emit(self, owner: Object, notes: tuple[EventNote, ...]) -> None:
        """Have these written, save what was said of the same object in the same words before."""
        # Not the owner itself: while thousands wait, each would keep a version of it in memory.
        named = {key: owner["metadata"][key] for key in ("name", "namespace", "uid")}
        regarding = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "metadata": named}
        for note in notes:
            key = (owner["metadata"]["uid"], note.reason, note.message)
            if key in self._seen:
                continue
            self._seen[key] = None
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            try:
                self._queue.put_nowait((regarding, note, self._now()))
            except asyncio.QueueFull:
                log.warning("event dropped: too many wait", reason=note.reason, name=owner["metadata"]["name"])

    async def run(self) -> None:
        """Write what `emit` takes, until cancelled."""
        while True:
            regarding, note, now = await self._queue.get()
            try:
                await self._write(event_for(regarding, note, self._instance, now))
            finally:
                self._queue.task_done()

    async def drain(self) -> None:
        """Wait until all that was emitted is written or given up; `run` must be running."""
        await self._queue.join()

    def forget(self) -> None:
        """Drop what waits: it is old news, or another replica's to tell."""
        while not self._queue.empty():
            self._queue.get_nowait()
            self._queue.task_done()

    async def _write(self, event: Object) -> None:
        try:
            await self._kube.create(event, manager=MANAGER)
        except AlreadyExists:
            pass  # said before a restart
        except KubeError as error:
            log.warning("event not written", target=event["metadata"]["name"], reason=str(error))


def event_for(owner: Object, note: EventNote, instance: str, now: datetime) -> Object:
    """The Event object; its name follows from the owner's uid, the reason and the message."""
    metadata = owner["metadata"]
    digest = hashlib.sha256("\0".join((metadata["uid"], note.reason, note.message)).encode()).hexdigest()[:16]
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.kind,
        "metadata": {"name": f"{metadata['name'][: MAX_NAME - 17]}.{digest}", "namespace": metadata["namespace"]},
        "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "trimtab.dev/operator",
        "reportingInstance": instance,
        "action": note.action,
        "reason": shorten(note.reason, 128),
        "regarding": {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "note": shorten(note.message, MAX_NOTE).encode()[:MAX_NOTE].decode(errors="ignore"),  # the bound is in bytes
        "type": note.type.value,
    }
