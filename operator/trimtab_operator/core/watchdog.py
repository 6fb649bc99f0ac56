"""A thread that ends the process when the event loop stands still while the process leads.

A blocked loop can't renew the Lease, nor end the work in time, nor answer a probe: only another thread can act.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

_TICKS = 10
"""How often the loop is looked at within the limit."""


def die(cause: str) -> NoReturn:
    """End the process at once: it can no longer be trusted to write nothing."""
    sys.stderr.write(f'{{"event": "{cause}; the process ends", "level": "critical"}}\n')
    sys.stderr.flush()
    os._exit(1)


@asynccontextmanager
async def watchdog(
    limit_seconds: float, leading: Callable[[], bool], die: Callable[[str], None] = die
) -> AsyncIterator[None]:
    """Watch this loop while the block runs.

    It counts its own rounds rather than seconds: a process that was stopped as a whole and goes on has not blocked.
    """
    ticked = threading.Event()
    ended = threading.Event()
    pause = limit_seconds / _TICKS

    async def tick() -> None:
        while True:
            ticked.set()
            await asyncio.sleep(pause / 2)

    def watch() -> None:
        missed = 0
        while not ended.wait(pause):
            missed = 0 if ticked.is_set() or not leading() else missed + 1
            ticked.clear()
            if missed >= _TICKS:
                faulthandler.dump_traceback(all_threads=True)
                die(f"the event loop has stood still for {limit_seconds:g} s")

    ticking = asyncio.create_task(tick(), name="watchdog")
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        ticking.cancel()
