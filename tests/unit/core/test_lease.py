"""The decisions of an election, over any order of looks, writes, pauses and clocks: never do two lead."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trimtab_operator.core.kube import Object
from trimtab_operator.core.lease import Seen, held, look, may_take, record_of, released

DURATION, DEADLINE = 10.0, 6.0
WALL = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def lease(holder: str, version: int = 1, **spec: Any) -> Object:
    metadata = {"name": "trimtab-operator", "namespace": "n", "resourceVersion": str(version), "labels": {"a": "b"}}
    base = {"holderIdentity": holder, "leaseDurationSeconds": 10, "leaseTransitions": 3, "renewTime": "", "extra": 1}
    return {"metadata": metadata, "spec": base | spec}


def seen(obj: Object | None, now: float = 100.0, before: Seen | None = None, identity: str = "me") -> Seen:
    return look(before, obj, now, identity, DURATION)


@pytest.mark.parametrize(
    ("found", "waited", "taken"),
    [
        (None, 0, True),  # there never was one
        (lease(""), 0, True),
        (lease("me"), 0, True),
        (lease("other"), 9.9, False),
        (lease("other"), 10, True),
        (lease("other", leaseDurationSeconds=30), 29, False),  # the holder's word, not our setting
        (lease("other", leaseDurationSeconds=None), 9.9, False),
        (lease("other", renewTime="2001-01-01T00:00:00.000000Z"), 9.9, False),  # whatever its clock says
    ],
)
def test_when_a_lease_may_be_taken(found: Object | None, waited: float, taken: bool) -> None:
    assert may_take(seen(found), 100 + waited, "me") is taken


def test_a_renewal_starts_the_wait_anew_and_nothing_else_does() -> None:
    first = seen(lease("other", renewTime="a"))
    touched = seen(lease("other", version=2, renewTime="a"), 105, first)
    assert may_take(touched, 110, "me")
    renewed = seen(lease("other", version=3, renewTime="b"), 105, first)
    assert not may_take(renewed, 110, "me")


def test_a_lease_that_vanishes_is_respected_by_others_and_made_again_by_its_holder() -> None:
    held_by_other = seen(lease("other"))
    gone = seen(None, 105, held_by_other)
    assert not may_take(gone, 114, "me")
    assert may_take(seen(None, 114, gone), 115, "me")
    assert may_take(seen(None, 105, seen(lease("me"))), 105, "me")


def test_what_is_written() -> None:
    taken = held(seen(lease("other", version=7)), "me", "trimtab-operator", "n", 9.5, WALL)
    assert taken["metadata"] == lease("", version=7)["metadata"]  # the precondition, and others' labels
    now = "2026-01-02T03:04:05.000678Z"
    assert taken["spec"] == {
        "holderIdentity": "me", "leaseDurationSeconds": 10, "leaseTransitions": 4, "renewTime": now,
        "acquireTime": now, "extra": 1,
    }  # fmt: skip
    renewed = held(seen(taken), "me", "trimtab-operator", "n", 9.5, WALL + timedelta(seconds=1))
    assert renewed["spec"] == taken["spec"] | {"renewTime": "2026-01-02T03:04:06.000678Z"}
    left = released(renewed, WALL + timedelta(seconds=2))
    assert (left["spec"]["holderIdentity"], left["spec"]["leaseTransitions"]) == ("", 4)
    assert may_take(seen(left), 100, "other")
    new = held(seen(None), "me", "trimtab-operator", "n", 10, WALL)
    assert (new["metadata"], new["spec"]["leaseTransitions"]) == ({"name": "trimtab-operator", "namespace": "n"}, 0)


@pytest.mark.parametrize("jump", [0, -3600])
def test_a_renewal_is_a_change_whatever_the_wall_clock_does(jump: float) -> None:
    first = held(seen(None), "me", "l", "n", DURATION, WALL)
    again = held(seen(first), "me", "l", "n", DURATION, WALL + timedelta(seconds=jump))
    assert record_of(again, DURATION) != record_of(first, DURATION)
    assert again["spec"]["renewTime"] > first["spec"]["renewTime"]


@dataclass
class Replica:
    """What a process remembers; between any two of its steps any time may pass."""

    identity: str
    seen: Seen | None = None
    valid_until: float = float("-inf")
    under_way: tuple[float, Object] | None = None
    """When a write was begun, and the write."""
    answer: tuple[float, Object] | None = None


REPLICAS = st.sampled_from(["a", "b", "c"])


class Election(RuleBasedStateMachine):
    """Three replicas, one Lease; each step of a replica may come late, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.version = 0
        self.live: Object | None = None
        self.replicas = {name: Replica(name) for name in "abc"}
        self.wall = WALL

    @initialize()
    def all_have_looked(self) -> None:
        for name in self.replicas:
            self.look(name)

    @rule(seconds=st.sampled_from([0.1, 1.5, 3.9, 6.0, 10.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from([-3600, 0, 1, 3600]))
    def the_wall_clock_jumps(self, seconds: int) -> None:
        self.wall += timedelta(seconds=seconds)

    @rule(name=REPLICAS)
    def look(self, name: str) -> None:
        replica = self.replicas[name]
        replica.seen = look(replica.seen, self.live, self.now, name, DURATION)

    @rule(name=REPLICAS)
    def begin_to_write(self, name: str) -> None:
        replica = self.replicas[name]
        if replica.seen is not None and may_take(replica.seen, self.now, name):
            replica.under_way = (self.now, held(replica.seen, name, "l", "n", DURATION, self.wall))

    @rule(name=REPLICAS)
    def the_write_arrives(self, name: str) -> None:
        replica = self.replicas[name]
        if replica.under_way is None:
            return
        begun, wanted = replica.under_way
        replica.under_way = None
        if self._store(wanted):
            assert self.live is not None
            replica.answer = (begun, self.live)

    @rule(name=REPLICAS, lost=st.booleans())
    def the_answer_arrives(self, name: str, lost: bool) -> None:
        replica = self.replicas[name]
        if replica.answer is not None and not lost:
            begun, written = replica.answer
            replica.seen = look(replica.seen, written, self.now, name, DURATION)
            replica.valid_until = begun + DEADLINE
        replica.answer = None

    @rule(name=REPLICAS)
    def hand_over(self, name: str) -> None:
        replica = self.replicas[name]
        if replica.seen is None or replica.seen.lease is None or replica.seen.record is None:
            return
        if replica.seen.record.holder == name:
            replica.valid_until, replica.under_way, replica.answer = float("-inf"), None, None
            self._store(released(replica.seen.lease, self.wall))

    @rule(name=REPLICAS)
    def restart(self, name: str) -> None:
        """The process of that name is gone for good; a new one has a new name, and has to look."""
        del self.replicas[name]
        self.replicas[name] = Replica(name)  # its identity may be the same here: that is the harder case
        self.look(name)

    @precondition(lambda self: self.live is not None)
    @rule()
    def someone_deletes_the_lease(self) -> None:
        for replica in self.replicas.values():
            # One that never saw it would not know that it was there, nor one whose first write is still on its way.
            if replica.under_way is not None and "resourceVersion" not in replica.under_way[1]["metadata"]:
                replica.under_way = None
            replica.seen = look(replica.seen, self.live, self.now, replica.identity, DURATION)
        self.live = None

    @invariant()
    def one_leads_at_most(self) -> None:
        leading = [name for name, replica in self.replicas.items() if self.now < replica.valid_until]
        assert len(leading) <= 1, f"{leading} lead at {self.now}"

    def _store(self, wanted: Object) -> bool:
        """The API server's part: a precondition, and a new version where something changed."""
        expected = wanted["metadata"].get("resourceVersion")
        if expected != (self.live["metadata"]["resourceVersion"] if self.live else None):
            return False
        if self.live is None or wanted["spec"] != self.live["spec"]:
            self.version += 1
        self.live = {**wanted, "metadata": {**wanted["metadata"], "resourceVersion": str(self.version)}}
        return True


Election.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestElection = Election.TestCase
