"""Processes of this machine, each below a supervisor that lets nothing outlive it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trimtab.local import supervisor
from trimtab.local.container import Process


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    exit_code: int
    oom_killed: bool = False
    output: str = ""


class Child:
    """A running process."""

    def __init__(self, handle: asyncio.subprocess.Process, result: Path) -> None:
        self._handle = handle
        self._result = result

    def terminate(self) -> None:
        """SIGTERM to the first process, as a kubelet sends it."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every process."""
        self._send(signal.SIGUSR1)

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._handle.send_signal(number)

    async def ended(self) -> Ended:
        """Wait for the end of all its processes."""
        output, _ = await self._handle.communicate()
        try:
            report = json.loads(self._result.read_text())
        except FileNotFoundError:  # the supervisor was killed, or killed the others at our word
            report = {"exitCode": 137, "oomKilled": False}
        return Ended(report["exitCode"], report["oomKilled"], (output or b"").decode(errors="replace"))


async def start(
    process: Process, *, result: Path, scratch: Path | None = None, log: Path | None = None, lock: int | None = None
) -> Child:
    """Start a process.

    Args:
        process: command, environment and directory.
        result: file that takes the exit code.
        scratch: folder to remove if this process dies before the child.
        log: file to which the output is appended; without it the output is kept for `Ended`.
        lock: descriptor of the working folder's lock, held until the process has ended.
    """
    result.unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
    this = [sys.executable, "-I", "-S", supervisor.__file__, str(result), str(os.getpid()), str(scratch or "-")]
    output = log.open("ab") if log else None
    try:
        handle = await asyncio.create_subprocess_exec(
            *this,
            *process.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output or asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(process.environment),
            cwd=process.directory,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    finally:
        if output:
            output.close()
    return Child(handle, result)
