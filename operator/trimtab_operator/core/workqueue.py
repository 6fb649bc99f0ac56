"""A queue of keys: each is in it once, and worked on by one worker at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

BASE_DELAY_SECONDS = 0.005
JITTER = 0.2

Key = TypeVar("Key")


class QueueClosed(Exception):
    """No key will come any more."""


class Handle(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Make it not happen."""

    def when(self) -> float:
        """When it happens, in seconds of the timer's clock."""


class Timer(Protocol):
    """A clock that calls back; an asyncio event loop is one, and a test brings its own."""

    def time(self) -> float:
        """Seconds, monotonic."""

    def call_later(self, delay: float, callback: Callable[..., None], *args: object) -> Handle:
        """Call `callback(*args)` in `delay` seconds."""


class WorkQueue(Generic[Key]):
    """First in, first out, without duplicates.

    A key that is added while a worker has it comes back when that worker is done, so no wake-up is lost and no key has
    two workers. `fail` counts a key's failures and delays it ever longer; `forget` starts the count anew.
    """

    def __init__(self, timer: Timer, *, cap_seconds: float, jitter: Callable[[], float] = random.random) -> None:
        self._timer = timer
        self._cap = cap_seconds
        self._jitter = jitter
        self._waiting: dict[Key, float] = {}
        self._active: dict[Key, float] = {}
        self._again: dict[Key, float] = {}
        self._later: dict[Key, Handle] = {}
        self._failures: dict[Key, int] = {}
        self._ready = asyncio.Event()
        self._closed = False

    def add(self, key: Key) -> None:
        """Have the key worked on, as soon as possible."""
        if self._closed:
            return
        if key in self._active:
            self._again.setdefault(key, self._timer.time())
        elif key not in self._waiting:
            self._wait(key, self._timer.time())

    def add_after(self, key: Key, delay: float) -> None:
        """Have the key worked on in `delay` seconds; of several such wishes the earliest holds."""
        if self._closed:
            return
        planned = self._later.get(key)
        if planned is not None:
            if planned.when() <= self._timer.time() + delay:
                return
            planned.cancel()
        self._later[key] = self._timer.call_later(max(0.0, delay), self._due, key)

    def take(self) -> Key | None:
        """The oldest key, now this worker's until `done`; None where none waits."""
        for key, since in self._waiting.items():
            del self._waiting[key]
            self._active[key] = since
            return key
        return None

    async def get(self) -> Key:
        """As `take`, but wait for a key.

        Raises:
            QueueClosed: The queue is closed.
        """
        while (key := self.take()) is None:
            if self._closed:
                raise QueueClosed
            self._ready.clear()
            await self._ready.wait()
        return key

    def since(self, key: Key) -> float:
        """When a key that a worker has was first added, by the timer's clock."""
        return self._active[key]

    def done(self, key: Key, *, pause: float = 0.0) -> None:
        """The worker is finished with the key; if it was added meanwhile it comes back, after `pause` seconds."""
        del self._active[key]
        since = self._again.pop(key, None)
        if since is None:
            return
        if pause > 0:
            self.add_after(key, pause)
        else:
            self._wait(key, since)

    def fail(self, key: Key) -> float:
        """Count a failure; seconds until the next try: 5 ms, doubled with each failure up to the cap, ±20 %."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(self._cap, BASE_DELAY_SECONDS * 2.0 ** min(failures, 60))
        return delay * (1 - JITTER + 2 * JITTER * self._jitter())

    def forget(self, key: Key) -> None:
        """The key's work went well: its next failure is its first."""
        self._failures.pop(key, None)

    def close(self) -> None:
        """Drop all that waits, now or for its time, and take no more."""
        self._closed = True
        self._ready.set()
        for handle in self._later.values():
            handle.cancel()
        self._later.clear()
        self._waiting.clear()
        self._again.clear()

    @property
    def depth(self) -> int:
        """How many keys wait for a worker."""
        return len(self._waiting)

    @property
    def oldest_seconds(self) -> float:
        """How long the first key has waited."""
        for since in self._waiting.values():
            return self._timer.time() - since
        return 0.0

    def _wait(self, key: Key, since: float) -> None:
        self._waiting[key] = since
        self._ready.set()

    def _due(self, key: Key) -> None:
        del self._later[key]
        self.add(key)
