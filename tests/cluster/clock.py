"""Where the time of a run goes, as lines while it runs and as a table at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Named phases with their seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = time.monotonic()
        self.phases: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block, also one that fails."""
        self._say(f"cluster: {name} …")
        started = time.monotonic()
        try:
            yield
        finally:
            self.phases.append((name, time.monotonic() - started))
            self._say(f"cluster: {name}: {self.phases[-1][1]:.0f} s")

    def table(self) -> list[str]:
        """One line a phase, and the whole time since the start."""
        rows = [*self.phases, ("in all", time.monotonic() - self._started)]
        return [f"{seconds:7.1f} s  {name}" for name, seconds in rows]
