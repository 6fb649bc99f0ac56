"""Process life: nothing outlives its parent, and a hung process shows where it hangs."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

STACKS_SIGNAL = signal.SIGUSR1
"""A training process answers it with the stacks of all its threads in its log, and ends."""
PARENT_VARIABLE = "TRIMTAB_PARENT"
"""Process id of the parent, so that a child can tell whether it is orphaned."""
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux).

    The parent says who it is in `PARENT_VARIABLE`; if it is gone already, this process ends at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):
        os._exit(128 + signal.SIGKILL)
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is allocated next; elsewhere nothing changes.

    Each step allocates what the one before freed. Given back to the kernel in between, it costs a page fault for every
    4 KiB: about 14 % of a step of `dpo` on two cores. The price is the heap's holes: a small Llama's
    activations took 1.4 times as much as with a threshold of 1 MiB, which `prepare`'s estimate counts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def redirect_output(log: Path) -> int:
    """Send this process's stdout and stderr to `log`; returns a descriptor of the former stdout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    former = os.dup(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(all_threads=True)
    # chained to the default action, which ends the process: one that was only stopped must not go on when woken
    faulthandler.register(STACKS_SIGNAL, file=sys.stderr, all_threads=True, chain=True)
    return former


def send(pid: int, signal_number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def wait_ended(pids: Iterable[int], seconds: float) -> None:
    """Wait until all have ended, or the time is over."""
    until = time.monotonic() + seconds
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)


def wait_gone(pid: int) -> None:
    """Kill a process that is not our child and wait until it has ended; a zombie has."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()
    while _is_alive(pid):
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tail(log: Path, lines: int) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * lines))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
