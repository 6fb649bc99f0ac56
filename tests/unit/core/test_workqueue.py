"""The queue keeps its promises under any order of calls, on a clock that the test moves."""

import asyncio
import heapq
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trimtab_operator.core.workqueue import QueueClosed, WorkQueue


class Planned:
    def __init__(self, when: float, callback: Callable[..., None], arguments: tuple[object, ...]) -> None:
        self._when = when
        self.call = lambda: callback(*arguments)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def when(self) -> float:
        return self._when


class Clock:
    """A timer whose time only `advance` moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Planned]] = []
        self._count = 0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., None], *arguments: object) -> Planned:
        planned = Planned(self.now + delay, callback, arguments)
        self._count += 1
        heapq.heappush(self._calls, (planned.when(), self._count, planned))
        return planned

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._calls and self._calls[0][0] <= end:
            self.now, _, planned = heapq.heappop(self._calls)
            if not planned.cancelled:
                planned.call()
        self.now = end


KEYS = st.sampled_from("abcd")


class Queue(RuleBasedStateMachine):
    """A model of what the queue owes: keys that must come up, and when those that were put off must at the latest."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.queue: WorkQueue[str] = WorkQueue(self.clock, cap_seconds=60, jitter=lambda: 0.5)
        self.owed: list[str] = []
        self.active: set[str] = set()
        self.again: set[str] = set()
        self.due: dict[str, float] = {}

    def come(self, key: str) -> None:
        if key in self.active:
            self.again.add(key)
        elif key not in self.owed:
            self.owed.append(key)

    @rule(key=KEYS)
    def add(self, key: str) -> None:
        self.queue.add(key)
        self.come(key)

    @rule(key=KEYS, delay=st.integers(1, 9))
    def add_after(self, key: str, delay: int) -> None:
        self.queue.add_after(key, delay)
        self.due[key] = min(self.due.get(key, float("inf")), self.clock.now + delay)

    @rule(seconds=st.integers(1, 9))
    def pass_time(self, seconds: int) -> None:
        self.clock.advance(seconds)
        for key, when in sorted(self.due.items(), key=lambda item: item[1]):
            if when <= self.clock.now:
                del self.due[key]
                self.come(key)

    @rule()
    def take(self) -> None:
        key = self.queue.take()
        assert key not in self.active  # one worker a key
        if not self.owed:
            assert key is None
            return
        assert key in self.owed  # of keys that fell due in the same pause the order is the clock's
        self.owed.remove(key)
        self.active.add(key)

    @precondition(lambda self: self.active)
    @rule(data=st.data(), pause=st.sampled_from([0, 3]))
    def done(self, data: st.DataObject, pause: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.active)))
        self.queue.done(key, pause=pause)
        self.active.remove(key)
        if key in self.again:
            self.again.remove(key)
            if pause:
                self.due[key] = min(self.due.get(key, float("inf")), self.clock.now + pause)
            else:
                self.come(key)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert self.queue.depth == len(self.owed)

    def teardown(self) -> None:
        """All that is owed comes up once work goes on."""
        if not hasattr(self, "queue"):
            return
        expected = {*self.owed, *self.again, *self.due}
        for key in self.active:
            self.queue.done(key)
        seen = set()
        for _ in range(3):
            while (key := self.queue.take()) is not None:
                seen.add(key)
                self.queue.done(key)
            self.clock.advance(20)
        assert seen == expected


Queue.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestQueue = Queue.TestCase


async def test_first_in_first_out_without_duplicates() -> None:
    queue: WorkQueue[str] = WorkQueue(Clock(), cap_seconds=60)
    for key in "abacb":
        queue.add(key)
    assert [await queue.get() for _ in range(3)] == ["a", "b", "c"]


async def test_a_waiting_worker_is_woken() -> None:
    queue: WorkQueue[str] = WorkQueue(asyncio.get_running_loop(), cap_seconds=60)
    waiting = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.add("now")
    queue.add_after("later", 0.01)
    done, pending = await asyncio.wait(waiting, timeout=10, return_when="FIRST_COMPLETED")
    assert [task.result() for task in done] == ["now"]
    done, pending = await asyncio.wait(pending, timeout=10, return_when="FIRST_COMPLETED")
    assert [task.result() for task in done] == ["later"]
    queue.close()
    with pytest.raises(QueueClosed):
        await pending.pop()


def test_backoff_doubles_up_to_the_cap_and_starts_anew() -> None:
    queue: WorkQueue[str] = WorkQueue(Clock(), cap_seconds=1, jitter=lambda: 0.5)
    assert [round(queue.fail("a"), 3) for _ in range(10)] == [
        0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0,
    ]  # fmt: skip
    assert queue.fail("b") == 0.005
    queue.forget("a")
    assert queue.fail("a") == 0.005
    for _ in range(3000):
        assert queue.fail("a") <= 1
    for jitter, factor in ((0.0, 0.8), (1.0, 1.2)):
        assert WorkQueue[str](Clock(), cap_seconds=1, jitter=lambda j=jitter: j).fail("a") == pytest.approx(
            0.005 * factor
        )


def test_age_of_the_oldest() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock, cap_seconds=1)
    assert queue.oldest_seconds == 0
    queue.add("a")
    clock.advance(2)
    queue.add("b")
    clock.advance(3)
    assert queue.oldest_seconds == 5
    queue.take()
    assert queue.oldest_seconds == 3


def test_a_key_tells_since_when_it_waits() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock, cap_seconds=100)
    queue.add("a")
    clock.advance(1)
    queue.add("a")
    assert queue.take() == "a"
    assert queue.since("a") == 0
    queue.add("a")
    clock.advance(1)
    queue.add("a")
    queue.done("a")
    assert queue.take() == "a"
    assert queue.since("a") == 1


def test_a_closed_queue_takes_nothing() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock, cap_seconds=1)
    queue.add("a")
    queue.add_after("b", 1)
    queue.close()
    queue.add("c")
    queue.add_after("d", 1)
    clock.advance(5)
    assert queue.take() is None
