"""One process beside each container: what it started dies with it, and it dies with `trimtab`.

Runs as `python -I -S supervisor.py RESULT PARENT SCRATCH COMMAND…` and uses the standard library only, so it starts in
milliseconds. It adopts every descendant (PR_SET_CHILD_SUBREAPER), forwards SIGTERM to the container's first process,
and kills them all on SIGUSR1, which the kernel also sends when the parent dies. When the first process has ended,
the others are killed, as at the end of a container, and RESULT is written. When the parent has died, nobody else is
left to remove the folder SCRATCH.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def die_with_parent() -> None:
    """Have the kernel kill the calling process when its parent dies; for the child's side of a fork."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(root: int) -> list[int]:
    """Process ids below `root`, from /proc; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            # The name in parentheses may hold anything, so the fields start after the last one.
            fields = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill_descendants() -> None:
    """Kill until none is left: a process may fork between the look and the signal."""
    while alive := descendants(os.getpid()):
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap()
        time.sleep(0.005)
    _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def _oom_kills() -> int:
    """Processes that this kernel has killed for want of memory since it started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def supervise(result: Path, parent: int, scratch: Path, command: list[str]) -> int:
    """Run `command` to its end; returns its exit code, 128 + N after signal N."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = 0

    def forward(signum: int, _frame: FrameType | None) -> None:
        if child:
            os.kill(child, signum)

    def abandon(_signum: int, _frame: FrameType | None) -> None:
        kill_descendants()
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(137)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR1, abandon)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != parent:
        return 137  # the parent died before the kernel knew of our wish
    kills = _oom_kills()
    child = os.fork()
    if child == 0:
        _become(command)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            break
    child = 0
    kill_descendants()
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    report = {"exitCode": code, "oomKilled": code == 137 and _oom_kills() > kills}
    draft = result.with_suffix(".draft")
    draft.write_text(json.dumps(report))
    draft.rename(result)
    return code


def _become(command: list[str]) -> None:
    """The child's side of the fork: default signals, nothing inherited but the standard streams, then exec."""
    try:
        die_with_parent()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.execvp(command[0], command)  # noqa: S606 - no shell is the point
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
