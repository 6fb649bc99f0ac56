"""Several replicas: who is to write does so soon, and nobody else does. Prints how long it took."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.jobs import Object, Space, until
from tests.controlplane.operator import Operator, grant

CRASH_SECONDS = 12.0
GRACEFUL_SECONDS = 2.0
RENEW_DEADLINE_SECONDS = 6.0
LEASE_SECONDS = 10.0
RECOVERY_SECONDS = 30.0
JOBS = 8
"""So many that there is always something to write while they run."""
BURST = 20


class Replicas:
    """Two or three operators of one cluster, and what the audit log says of each."""

    def __init__(self, control_plane: ControlPlane, operators: list[Operator]) -> None:
        self.control_plane = control_plane
        self.operators = operators

    def leader(self) -> Operator:
        """The one that leads, as soon as there is one."""
        found: Operator = until(lambda: next((each for each in self.operators if each.leads()), None), "one leads")
        return found

    def others(self, leader: Operator) -> list[Operator]:
        """All but this one."""
        return [each for each in self.operators if each is not leader]

    def writes(self) -> list[tuple[float, str, Object]]:
        """Of objects, in order: when it came, which replica sent it, and the event. The election's are none."""
        found = []
        for event in self.control_plane.audit():
            ref = event.get("objectRef", {})
            if (
                event["user"]["username"] == "operator"
                and event["verb"] not in ("get", "list", "watch")
                and ref["resource"] != "leases"
            ):
                sender = event["userAgent"].partition("(")[2].partition("_")[0]
                found.append((seconds(event["requestReceivedTimestamp"]), sender, event))
        return sorted(found, key=lambda each: each[0])

    def first_write(self, after: float, senders: list[Operator]) -> tuple[float, str]:
        """When, after a moment, one of these first wrote, and which."""
        names = {each.identity for each in senders}

        def look() -> tuple[float, str] | None:
            return next(((at, who) for at, who, _ in self.writes() if at > after and who in names), None)

        found: tuple[float, str] = until(look, f"one of {sorted(names)} writes")
        return found

    def restart(self, operator: Operator) -> None:
        """Again a passive replica, with its store warm."""
        operator.start(leads=False)


def seconds(timestamp: str) -> float:
    """Of the wall clock, which all processes here share."""
    return datetime.fromisoformat(timestamp).timestamp()


@contextmanager
def replicas(control_plane: ControlPlane, count: int) -> Iterator[Replicas]:
    install_crds(control_plane)
    grant(control_plane)
    with ExitStack() as stack:
        operators = [Operator(control_plane, identity=f"replica-{n}") for n in range(count)]
        for number, each in enumerate(operators):
            stack.callback(each.close)
            each.start(leads=number == 0)
        yield Replicas(control_plane, operators)


@pytest.fixture(scope="module")
def three(control_plane: ControlPlane) -> Iterator[Replicas]:
    with replicas(control_plane, 3) as running:
        yield running


@pytest.fixture
def busy(three: Replicas, space: Space) -> Space:
    """Jobs that run all the time, so that a leader always has something to write."""
    three.leader()
    space.apply(*(named(space.job(), f"job-{number}") for number in range(JOBS)))
    until(lambda: space.items("jobs"), "the leader works")
    return space


def named(job: Object, name: str) -> Object:
    job["metadata"]["name"] = name
    job["spec"].pop("rollout", None)
    return job


def sent(operator: Operator) -> float:
    """How many writes it has sent."""
    samples = operator.metrics()["trimtab_operator_api_requests"].samples
    return sum(sample.value for sample in samples if sample.labels["verb"] in ("POST", "PATCH", "DELETE"))


def more(space: Space, name: str) -> None:
    """One more job: something to write for whoever leads."""
    space.apply(named(space.job(), name))


def say(text: str, capsys: Any) -> None:
    with capsys.disabled():
        print(f"\n{text}", flush=True)


def test_a_killed_leader_is_replaced(three: Replicas, busy: Space, capsys: Any) -> None:
    old = three.leader()
    synced = {each.identity: each.value("synced") for each in three.operators}
    assert set(synced.values()) == {1}  # the passive ones are ready, with warm stores
    killed = time.time()
    old.kill()
    more(busy, "after-the-kill")
    at, who = three.first_write(killed, three.others(old))
    say(f"leader killed: next write after {at - killed:.1f} s, by {who}", capsys)
    assert at - killed <= CRASH_SECONDS
    three.restart(old)
    assert sum(each.leads() for each in three.operators) == 1


def test_a_leader_that_is_told_to_stop_hands_over(three: Replicas, busy: Space, capsys: Any) -> None:
    old = three.leader()
    told = time.time()
    old.signal(signal.SIGTERM)
    more(busy, "after-the-hand-over")
    at, who = three.first_write(told, three.others(old))
    say(f"SIGTERM: next write after {at - told:.2f} s, by {who}", capsys)
    assert at - told <= GRACEFUL_SECONDS
    assert old.wait() == 0
    assert [at for at, who, _ in three.writes() if who == old.identity and at > told + GRACEFUL_SECONDS] == []
    three.restart(old)


def test_a_stopped_leader_writes_nothing_when_it_goes_on(three: Replicas, busy: Space, capsys: Any) -> None:
    """It is stopped while requests are under way: their answers are what it finds first, and would act on."""
    old = three.leader()
    before = sent(old)
    burst = [named(busy.job(), f"burst-{number}") for number in range(BURST)]
    with ThreadPoolExecutor(max_workers=1) as user:
        applied = user.submit(busy.apply, *burst)
        until(lambda: sent(old) >= before + BURST, "the leader is at it")
        stopped = time.time()
        old.signal(signal.SIGSTOP)
        applied.result()
    at, who = three.first_write(stopped + 0.5, three.others(old))
    time.sleep(max(0.0, stopped + LEASE_SECONDS + 3 - time.time()))
    old.signal(signal.SIGCONT)
    more(busy, "after-it-goes-on")
    until(lambda: busy.items("jobs", job="after-it-goes-on"), "the new leader works")
    time.sleep(2)
    late = [event["requestURI"] for when, sender, event in three.writes() if sender == old.identity and when > at]
    say(f"SIGSTOP: next write after {at - stopped:.1f} s, by {who}; by the old one after that: {len(late)}", capsys)
    assert late == []
    assert not old.leads()
    assert three.leader() is not old
    log = old.log.read_text()
    assert "no longer leading" in log
    assert "NotLeading" in log, "it did not even try: the fence was not put to the test"


def test_a_leader_that_the_api_server_does_not_answer_steps_down(
    three: Replicas, busy: Space, control_plane: ControlPlane, capsys: Any
) -> None:
    old = three.leader()
    with control_plane.frozen_apiserver():
        hung = time.time()
        until(lambda: not old.leads(), "the leader steps down")
        after = time.time() - hung
        time.sleep(RENEW_DEADLINE_SECONDS)
        assert [each for each in three.operators if each.leads()] == []
    back = time.time()
    more(busy, "after-the-hang")
    at, _ = three.first_write(back, three.operators)
    say(f"API server hung: no leader after {after:.1f} s; next write {at - back:.1f} s after it was back", capsys)
    assert after <= RENEW_DEADLINE_SECONDS + 1
    assert at - back <= RECOVERY_SECONDS


def test_refused_connections_cost_the_leadership_and_no_process(
    three: Replicas, busy: Space, control_plane: ControlPlane, capsys: Any
) -> None:
    old = three.leader()
    control_plane.stop_apiserver()
    until(lambda: not old.leads(), "the leader steps down")
    control_plane.start_apiserver()
    back = time.time()
    more(busy, "after-the-outage")
    at, who = three.first_write(back, three.operators)
    say(f"API server refused: next write {at - back:.1f} s after it was back, by {who}", capsys)
    assert at - back <= RECOVERY_SECONDS
    assert all(each.is_running() for each in three.operators)
