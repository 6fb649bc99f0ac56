"""Reads the Warnings about children that do not get on.

Nothing is watched. Only an object that has stood on the board for a while is asked about, and then seldom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from trimtab_operator.core.complaints import Complaint, ComplaintBoard, Subject
from trimtab_operator.core.controller import Reader
from trimtab_operator.core.errors import KubeError
from trimtab_operator.core.kube import EVENT, KINDS, Kube, Object, Ref
from trimtab_operator.core.podproblems import refusal_words
from trimtab_operator.core.reports import clean
from trimtab_operator.core.settings import Settings

PAUSE_SECONDS = 60.0
"""Between two questions about the same child."""
ROUND_SECONDS = 5.0
MOST_AT_ONCE = 20
"""Questions in a round: each makes the API server read the namespace's Events."""

log = structlog.stdlib.get_logger(__name__)


class ComplaintReader:
    """A companion of the runtime: reads the Warnings about what the boards hold, and wakes owners with news."""

    def __init__(self, kube: Kube, board: ComplaintBoard, settings: Settings) -> None:
        self._kube = kube
        self._board = board
        self._patience = settings.complaint_seconds
        self._due: dict[Subject, float] = {}

    async def run(self, reader: Reader, wake: Callable[[Ref], None]) -> None:
        """Ask until cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(ROUND_SECONDS, self._patience))
            for owner in self._board.owners():
                if reader.get(KINDS[owner.kind], owner.namespace, owner.name) is None:
                    self._board.forget(owner)
            for owner in await self.ask(now()):
                wake(owner)

    async def ask(self, now: float) -> list[Ref]:
        """Ask about the children whose turn it is; the owners that have news. `now`: seconds of any steady clock."""
        asked = {subject: owner for owner in self._board.owners() for subject in self._board.targets(owner)}
        self._due = {subject: self._due.get(subject, now + self._patience) for subject in asked}
        turn = sorted((due, index) for index, due in enumerate(self._due.values()) if due <= now)[:MOST_AT_ONCE]
        subjects = list(self._due)
        news = []
        for _, index in turn:
            subject = subjects[index]
            self._due[subject] = now + PAUSE_SECONDS
            try:
                found = await self._newest(subject)
            except KubeError as error:
                log.warning("Events not read", namespace=subject.namespace, reason=str(error))
                continue
            if self._board.put(subject, found):
                news.append(asked[subject])
        return list(dict.fromkeys(news))

    async def _newest(self, subject: Subject) -> Complaint | None:
        fields = {"regarding.uid": subject.uid, "type": "Warning"}
        events = await self._kube.list_objects(EVENT, namespace=subject.namespace, fields=fields)
        newest = max(events, key=_when, default=None)
        if newest is None:
            return None
        return Complaint(newest.get("reason") or "", clean(refusal_words(newest.get("note") or ""), 1024))


def _when(event: Object) -> str:
    """When it was said last: RFC 3339, comparable as text to the second."""
    series = event.get("series") or {}
    told: list[str | None] = [
        series.get("lastObservedTime"),
        event.get("deprecatedLastTimestamp"),
        event.get("eventTime"),
        event["metadata"].get("creationTimestamp"),
    ]
    return max((time for time in told if time), default="")
