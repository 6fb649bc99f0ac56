"""A loop that stands still ends the process, if it leads; a process that was stopped as a whole goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import asyncio, sys, time
from trimtab_operator.core.watchdog import watchdog

async def main(leads, blocks):
    async with watchdog(0.5, lambda: leads):
        print("up", flush=True)
        await asyncio.sleep(1)
        time.sleep(blocks)
        await asyncio.sleep(1)

asyncio.run(main(sys.argv[1] == "leads", float(sys.argv[2])))
"""


def process(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "status"), [(("leads", "30"), 1), (("leads", "0.1"), 0), (("passive", "1.5"), 0)], ids=str
)
def test_only_a_leader_whose_loop_stands_still_is_ended(arguments: tuple[str, str], status: int) -> None:
    running = process(*arguments)
    _, errors = running.communicate(timeout=25)
    assert running.returncode == status, errors
    if status:
        assert "the event loop has stood still for 0.5 s" in errors
        assert "time.sleep(blocks)" in errors or 'File "<string>"' in errors  # where it stood


def test_a_stopped_process_is_not_a_blocked_loop() -> None:
    running = process("leads", "0")
    assert running.stdout is not None
    running.stdout.readline()
    os.kill(running.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(running.pid, signal.SIGCONT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
