"""The elector against a Lease in memory, in virtual time: hangs, refusals, lost answers, hands that meddle."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.core.virtual import run

from trimtab_operator.core.errors import AlreadyExists, Conflict, Forbidden, NotFound, Unavailable
from trimtab_operator.core.kube import Kind, Object
from trimtab_operator.core.leader import Elector, NotLeading, Timing, WorkEnded, alone

TIMING = Timing()
MARGIN = TIMING.duration - TIMING.renew_deadline


class Link(Enum):
    """What becomes of a replica's requests."""

    WELL = auto()
    HANGS = auto()
    REFUSES = auto()
    FORBIDS = auto()
    LOSES = auto()
    """It is carried out, and no answer comes."""


@dataclass
class Server:
    """One Lease, as the API server keeps it."""

    lease: Object | None = None
    version: int = 0

    def put(self, obj: Object) -> Object:
        if self.lease is None:
            raise NotFound(404, "NotFound", "no such lease")
        if obj["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict(409, "Conflict", "the object has been modified")
        return self.keep(obj)

    def post(self, obj: Object) -> Object:
        if self.lease is not None:
            raise AlreadyExists(409, "AlreadyExists", "there is one")
        return self.keep(obj)

    def keep(self, obj: Object) -> Object:
        self.version += 1
        self.lease = copy.deepcopy(obj)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.lease)

    def meddle(self, **spec: Any) -> None:
        """Someone edits it."""
        assert self.lease is not None
        self.keep({**self.lease, "spec": self.lease["spec"] | spec})

    @property
    def spec(self) -> Object:
        assert self.lease is not None
        return dict(self.lease["spec"])


@dataclass
class Leases:
    """The way of one replica to the server."""

    server: Server
    link: Link = Link.WELL
    renewed: float = 0.0
    """When the last write that was answered was sent."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return await self._through(lambda: copy.deepcopy(self.server.lease))

    async def create(self, obj: Object, *, manager: str) -> Object:
        return await self._through(lambda: self.server.post(obj))

    async def replace(self, obj: Object, *, manager: str) -> Object:
        sent = asyncio.get_running_loop().time()
        answer: Object = await self._through(lambda: self.server.put(obj))
        self.renewed = sent
        return answer

    async def _through(self, call: Callable[[], Any]) -> Any:
        await asyncio.sleep(0.01)
        match self.link:
            case Link.HANGS:
                await asyncio.sleep(3600)
            case Link.REFUSES:
                raise Unavailable(0, "ClientConnectorError", "refused")
            case Link.FORBIDS:
                raise Forbidden(403, "Forbidden", "no rights to leases")
            case Link.LOSES:
                call()
                await asyncio.sleep(3600)
        return call()


@dataclass
class Replica:
    """A process: its elector, its work, and when it worked."""

    name: str
    server: Server
    others: list[Replica]
    finishing: float = 0.1
    """How long its work takes to end when it is cancelled."""
    drains: float = 0.0
    """How long it would take to finish what it has."""
    spells: list[tuple[float, float]] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    told: float = 0.0
    """When its work was last told to end."""

    def __post_init__(self) -> None:
        self.leases = Leases(self.server)
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.begun: float | None = None
        self.broken: asyncio.Future[str] = self.loop.create_future()
        self.elector = Elector(
            self.leases, name="trimtab-operator", namespace="n", identity=self.name, timing=TIMING,
            clock=self.loop.time, die=self.deaths.append,
        )  # fmt: skip
        self.others.append(self)
        self.task = asyncio.create_task(self.elector.run(self, self.stop))

    def begin(self) -> asyncio.Future[str]:
        assert self.elector.leading
        for other in self.others:
            assert other is self or (other.begun is None and not other.elector.leading), f"{other.name} is at work"
        self.begun = self.loop.time()
        self.broken = self.loop.create_future()
        return self.broken

    async def end(self, grace_seconds: float) -> None:
        self.told = self.loop.time()
        await asyncio.sleep(min(self.drains, grace_seconds) + self.finishing)
        assert self.begun is not None
        self.spells.append((self.begun, self.loop.time()))
        self.begun = None


def scenario(body: Callable[..., Coroutine[Any, Any, None]], names: str = "ab") -> None:
    """Run a scenario with these replicas, all of which end in order."""

    async def main() -> None:
        server, replicas = Server(), []
        made = [Replica(name, server, replicas) for name in names]
        await asyncio.sleep(0.005)  # the first one asks first
        await body(server, *made)
        for each in made:
            each.stop.set()
        async with asyncio.timeout(100):
            await asyncio.gather(*(each.task for each in made if not each.task.done()))
        for each in made:
            if each.task.done() and not each.task.cancelled():
                each.task.result()

    run(main())


async def leader(*replicas: Replica) -> Replica:
    """The one that works, as soon as there is one."""
    async with asyncio.timeout(100):
        while True:
            for each in replicas:
                if each.begun is not None:
                    return each
            await asyncio.sleep(0.01)


def test_one_works_and_keeps_the_lease() -> None:
    async def body(server: Server, a: Replica, b: Replica) -> None:
        first = await leader(a, b)
        await asyncio.sleep(3600)
        assert first.begun is not None
        assert not first.spells
        assert server.spec["leaseTransitions"] == 0
        second = b if first is a else a
        assert second.elector.transitions == 0
        with pytest.raises(NotLeading):
            second.elector.check()
        first.elector.check()

    scenario(body)


def test_a_successor_takes_over_within_one_retry_of_the_release() -> None:
    async def body(server: Server, a: Replica, b: Replica) -> None:
        first = await leader(a, b)
        second = b if first is a else a
        first.drains = 0.3
        await asyncio.sleep(100)
        told = first.loop.time()
        first.stop.set()
        await first.task
        assert server.spec["holderIdentity"] == ""
        await leader(second)
        assert second.begun is not None
        assert second.begun - told <= 0.3 + first.finishing + TIMING.retry + 0.1
        assert (server.spec["holderIdentity"], server.spec["leaseTransitions"]) == (second.name, 1)

    scenario(body)


def test_the_drain_is_bounded() -> None:
    async def body(server: Server, a: Replica) -> None:
        a.drains = 100
        await leader(a)
        told = a.loop.time()
        a.stop.set()
        await a.task
        assert a.loop.time() - told < 1.5
        assert a.deaths == []

    scenario(body, "a")


@pytest.mark.parametrize("link", [Link.HANGS, Link.REFUSES, Link.FORBIDS, Link.LOSES])
def test_a_leader_that_can_not_renew_ends_its_work_before_another_begins(link: Link) -> None:
    async def body(server: Server, a: Replica, b: Replica) -> None:
        first = await leader(a, b)
        second = b if first is a else a
        first.finishing = MARGIN - 0.2
        await asyncio.sleep(100)
        cut, first.leases.link = first.loop.time(), link
        await leader(second)  # whose `begin` looks whether the first still works
        assert len(first.spells) == 1
        assert first.told - first.leases.renewed <= TIMING.renew_deadline + 0.01
        assert second.begun is not None
        if link is not Link.LOSES:  # then its last renewal is the one whose answer it did not get
            assert second.begun - cut <= TIMING.duration + TIMING.retry + 0.1
        first.leases.link = Link.WELL
        await asyncio.sleep(30)
        assert first.begun is None

    scenario(body)


def test_work_that_does_not_end_in_time_ends_the_process() -> None:
    async def body(server: Server, a: Replica) -> None:
        await leader(a)
        a.finishing = MARGIN + 1
        a.leases.link = Link.HANGS
        await asyncio.sleep(TIMING.duration + 0.2)
        assert len(a.deaths) == 1
        a.finishing, a.leases.link, a.begun = 0.1, Link.WELL, None

    scenario(body, "a")


def test_a_short_outage_costs_nothing() -> None:
    async def body(server: Server, a: Replica, b: Replica) -> None:
        first = await leader(a, b)
        for link in (Link.REFUSES, Link.HANGS, Link.LOSES):
            first.leases.link = link
            await asyncio.sleep(2)
            first.leases.link = Link.WELL
            await asyncio.sleep(10)
        assert not first.spells
        assert first.begun is not None

    scenario(body)


def test_all_lose_their_way_and_one_works_again_soon_after() -> None:
    async def body(server: Server, a: Replica, b: Replica) -> None:
        await leader(a, b)
        for each in (a, b):
            each.leases.link = Link.REFUSES
        await asyncio.sleep(600)
        assert (a.begun, b.begun) == (None, None)
        for each in (a, b):
            each.leases.link = Link.WELL
        back = a.loop.time()
        found = await leader(a, b)
        assert found.begun is not None
        assert found.begun - back <= TIMING.retry + 0.1

    scenario(body)


def test_broken_work_gives_the_lease_up_and_ends_the_process() -> None:
    async def body(server: Server, a: Replica, b: Replica) -> None:
        first = await leader(a, b)
        first.broken.set_result("worker-3")
        with pytest.raises(WorkEnded, match="worker-3"):
            await first.task
        first.task = asyncio.create_task(asyncio.sleep(0))
        assert len(first.spells) == 1
        assert server.spec["holderIdentity"] == ""
        await leader(b if first is a else a)

    scenario(body)


def test_hands_that_meddle() -> None:
    async def body(server: Server, a: Replica, b: Replica) -> None:
        first = await leader(a, b)
        server.meddle(somebody="was here")  # a conflict, and still ours
        await asyncio.sleep(5)
        assert not first.spells
        assert server.spec["somebody"] == "was here"
        server.lease = None
        await asyncio.sleep(5)
        assert not first.spells
        assert server.spec["holderIdentity"] == first.name
        server.meddle(holderIdentity="someone else")
        await asyncio.sleep(2)
        assert len(first.spells) == 1
        assert server.spec["holderIdentity"] == "someone else"

    scenario(body)


def test_without_an_election_the_work_ends_as_well() -> None:
    async def main() -> None:
        work = Alone()
        stop = asyncio.Event()
        running = asyncio.create_task(alone(work, stop))
        await asyncio.sleep(1)
        assert work.running
        stop.set()
        await running
        assert not work.running
        running = asyncio.create_task(alone(work, asyncio.Event()))
        await asyncio.sleep(1)
        work.broken.set_result("events")
        with pytest.raises(WorkEnded, match="events"):
            await running
        assert not work.running

    run(main())


class Alone:
    running = False

    def begin(self) -> asyncio.Future[str]:
        self.running = True
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return self.broken

    async def end(self, grace_seconds: float) -> None:
        self.running = False


FAULTS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(list(Link)), st.sampled_from([0.2, 1.0, 3.0, 7.0, 12.0])), max_size=25
)


@settings(max_examples=60, deadline=None)
@given(faults=FAULTS)
def test_whatever_happens_to_the_network_two_never_work_and_one_does_in_the_end(
    faults: list[tuple[int, Link, float]],
) -> None:
    async def body(server: Server, *replicas: Replica) -> None:
        for number, link, seconds in faults:
            replicas[number].leases.link = link
            await asyncio.sleep(seconds)
        for each in replicas:
            each.leases.link = Link.WELL
        calm = replicas[0].loop.time()
        found = await leader(*replicas)
        assert found.loop.time() - calm <= TIMING.duration + TIMING.retry + 2.1
        assert [each.deaths for each in replicas] == [[]] * 3

    scenario(body, "abc")
