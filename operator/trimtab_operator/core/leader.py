"""Who works: replicas elect one by a Lease, and the one that was elected knows in time when it no longer is.

The holder may write until `renew_deadline` after it *sent* its last successful renewal; others take the Lease no
sooner than `duration` after they *saw* that renewal. What lies between is for ending the work, which is awaited; a
process that can't end it in that time ends itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any, Protocol, TypeVar

import structlog

from trimtab_operator.core.errors import AlreadyExists, Conflict, KubeError, NotFound, Unavailable
from trimtab_operator.core.kube import LEASE, Kind, Object
from trimtab_operator.core.lease import Seen, held, look, may_take, released
from trimtab_operator.core.names import MANAGER
from trimtab_operator.core.waiting import cancelled, set_within
from trimtab_operator.core.watchdog import die

CALL_SECONDS = 2.0
"""No request about the Lease takes longer; it is asked again."""
DRAIN_SECONDS = 1.0
"""How long the work may take to finish what it has before the Lease is handed over."""

log = structlog.stdlib.get_logger(__name__)
_Answer = TypeVar("_Answer")


class Leases(Protocol):
    """The three requests of an election. Each raises `core.errors.KubeError` or a subclass."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The live Lease; None where there is none."""

    async def create(self, obj: Object, *, manager: str) -> Object:
        """POST; `AlreadyExists` where another was faster."""

    async def replace(self, obj: Object, *, manager: str) -> Object:
        """PUT; `Conflict` where the resourceVersion is not the live one."""


class Work(Protocol):
    """What only the leader does."""

    def begin(self) -> asyncio.Future[str]:
        """Start; the future is done, and says what ended, when the work has broken down by itself."""

    async def end(self, grace_seconds: float) -> None:
        """Finish what is at hand within the grace, then cancel the rest; nothing runs when this returns."""


class WorkEnded(RuntimeError):
    """A part of the work ended by itself: a fault of ours that only a new process mends."""


class NotLeading(Unavailable):
    """A write was not sent, because this process does not hold the Lease (any more)."""

    def __init__(self) -> None:
        super().__init__(0, "NotLeading", "not sent: this replica does not hold the Lease")


@dataclass(frozen=True)
class Timing:
    """Seconds; `retry` < `renew_deadline` < `duration`."""

    duration: float = 10.0
    renew_deadline: float = 6.0
    retry: float = 1.5


class _Round(Enum):
    """How one attempt to hold the Lease ended."""

    HELD = auto()
    OTHERS = auto()
    FAILED = auto()


def boot_clock() -> float:
    """Monotonic seconds that also pass while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Elector:
    """Takes part in the election while `run` runs."""

    def __init__(
        self,
        leases: Leases,
        *,
        name: str,
        namespace: str,
        identity: str,
        timing: Timing,
        owner: Object | None = None,
        clock: Callable[[], float] = boot_clock,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        die: Callable[[str], None] = die,
    ) -> None:
        """`identity` must be this process's alone: two that share one would take each other's Lease for their own.

        `owner`: a reference to the object with which a Lease that we create goes away.
        """
        self.identity = identity
        self.at_work = False
        """Whether the work runs, be the Lease still valid or not: what the watchdog asks."""
        self.transitions = 0
        """How often this process has become the leader."""
        self._leases = leases
        self._name, self._namespace = name, namespace
        self._timing = timing
        self._owner = owner
        self._clock = clock
        self._wall = wall
        self._die = die
        self._seen: Seen | None = None
        self._doubtful = True
        self._valid_until = float("-inf")
        self._trouble = ""

    @property
    def leading(self) -> bool:
        """Whether this process may write, right now."""
        return self._left > 0

    @property
    def _left(self) -> float:
        return self._valid_until - self._clock()

    def check(self) -> None:
        """The fence: called before each write is sent.

        Raises:
            NotLeading: The Lease is not ours, or no longer for sure.
        """
        if not self.leading:
            raise NotLeading

    async def run(self, work: Work, stop: asyncio.Event) -> None:
        """Lead whenever possible, until `stop` is set; then hand over.

        Raises:
            WorkEnded: The work has broken down; the Lease has been given up.
        """
        while not stop.is_set():
            if await self._round() is _Round.HELD:
                await self._lead(work, stop)
            elif await set_within(stop, self._pause_of_candidate()):
                return

    async def _lead(self, work: Work, stop: asyncio.Event) -> None:
        self.transitions += 1
        log.info("leading", identity=self.identity)
        self.at_work = True
        broken = work.begin()
        renewing = asyncio.create_task(self._renew(), name="renew")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        lost = True
        try:
            await _first(broken, renewing, stopping)
            lost = renewing.done()
        finally:
            await cancelled(renewing, stopping)
            await self._end(work, 0.0 if lost or broken.done() else DRAIN_SECONDS)
        if lost:
            log.warning("no longer leading", identity=self.identity, reason=renewing.result())
        else:
            await self._release()
        if broken.done():
            raise WorkEnded(f"{broken.result()} ended by itself")

    async def _renew(self) -> str:
        """Returns when the Lease is lost, and why: another has it, or it could not be renewed by the deadline."""
        pause = self._pause()
        while True:
            await asyncio.sleep(max(0.0, min(pause, self._left)))
            try:
                async with asyncio.timeout(self._left):
                    outcome = await self._round()
            except TimeoutError:
                outcome = _Round.FAILED
            if outcome is _Round.OTHERS:
                return "another replica holds the Lease"
            if not self.leading:
                cause = self._trouble or "the process stood still"
                return f"not renewed within {self._timing.renew_deadline:g} s: {cause}"
            pause = self._pause() if outcome is _Round.HELD else self._pause() / 2

    async def _end(self, work: Work, grace: float) -> None:
        """End the work while nobody else can have begun; the process ends where that fails."""
        if grace == 0.0:
            self._valid_until = float("-inf")
        try:
            async with asyncio.timeout(self._timing.duration - self._timing.renew_deadline):
                await work.end(grace)
        except TimeoutError:
            self._die("the work of a replica that no longer leads does not end")
        self._valid_until = float("-inf")
        self.at_work = False

    async def _release(self) -> None:
        """Best effort: without it, a successor waits for the Lease's duration."""
        try:
            for _ in range(2):
                if self._doubtful:
                    await self._look()
                seen = self._seen
                if seen is None or seen.lease is None or seen.record is None or seen.record.holder != self.identity:
                    return
                try:
                    self._see(
                        await self._bounded(self._leases.replace(released(seen.lease, self._wall()), manager=MANAGER))
                    )
                except (Conflict, NotFound):
                    self._doubtful = True
                else:
                    log.info("released the Lease", identity=self.identity)
                    return
        except (KubeError, TimeoutError) as error:
            log.warning("the Lease was not released", reason=str(error) or type(error).__name__)

    async def _round(self) -> _Round:
        """One attempt to take or to renew the Lease; a conflict is looked into once."""
        try:
            for _ in range(2):
                if self._doubtful or not self.leading:
                    await self._look()
                if self._seen is None or not may_take(self._seen, self._clock(), self.identity):
                    self._settled()
                    return _Round.OTHERS
                try:
                    await self._write(self._seen)
                except (Conflict, AlreadyExists, NotFound) as error:
                    self._doubtful, self._trouble = True, str(error)
                else:
                    self._settled()
                    return _Round.HELD
        except (KubeError, TimeoutError) as error:
            self._doubtful = True
            reason = str(error) or f"no answer within {CALL_SECONDS} s"
            if not self._trouble:
                log.warning("no access to the Lease", name=self._name, namespace=self._namespace, reason=reason)
            self._trouble = reason
        return _Round.FAILED

    async def _look(self) -> None:
        self._see(await self._bounded(self._leases.get(LEASE, self._namespace, self._name)))

    async def _write(self, seen: Seen) -> None:
        begun = self._clock()
        lease = held(seen, self.identity, self._name, self._namespace, self._timing.duration, self._wall(), self._owner)
        send = self._leases.create if seen.lease is None else self._leases.replace
        self._see(await self._bounded(send(lease, manager=MANAGER)))
        self._valid_until = begun + self._timing.renew_deadline

    def _see(self, lease: Object | None) -> None:
        self._seen = look(self._seen, lease, self._clock(), self.identity, self._timing.duration)
        self._doubtful = False

    def _settled(self) -> None:
        if self._trouble:
            log.info("access to the Lease again", name=self._name, namespace=self._namespace)
        self._trouble = ""

    async def _bounded(self, call: Awaitable[_Answer]) -> _Answer:
        async with asyncio.timeout(CALL_SECONDS):
            return await call

    def _pause_of_candidate(self) -> float:
        """Not beyond the moment from which the Lease may be taken; and shorter than the holder's pause.

        What passes between a renewal and its being seen is added to the time of a failover.
        """
        pause = 0.75 * self._pause()
        until_free = self._seen.since + self._seen.respected - self._clock() if self._seen is not None else 0.0
        return min(pause, until_free) if until_free > 0 else pause

    def _pause(self) -> float:
        """Until the next attempt; the retry period at most, so that a released Lease is taken within one."""
        return self._timing.retry * random.uniform(0.8, 1.0)  # noqa: S311


async def alone(work: Work, stop: asyncio.Event) -> None:
    """Without an election: work until told to stop.

    Raises:
        WorkEnded: The work has broken down.
    """
    broken = work.begin()
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await _first(broken, stopping)
    finally:
        await cancelled(stopping)
    await work.end(DRAIN_SECONDS)
    if broken.done():
        raise WorkEnded(f"{broken.result()} ended by itself")


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
