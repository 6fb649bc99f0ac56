"""One process of the control plane: it ends with the process that started it, and its errors show its log."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

LOG_TAIL_LINES = 30


class ClusterError(RuntimeError):
    """A component did not start or died; the message ends with the tail of its log."""


class Component:
    """A running process of the control plane; its output goes to `log`."""

    def __init__(self, name: str, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self._name = name
        self._log = log
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ClusterError("setpriv is not on PATH: install util-linux; it ends the components with the test run")
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [setpriv, "--pdeathsig=KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,
            )

    @property
    def pid(self) -> int:
        """The id of the process; `setpriv` has become the command."""
        return self._process.pid

    def check(self) -> None:
        """Raises `ClusterError` if the process has ended."""
        if (status := self._process.poll()) is not None:
            self.fail(f"exited with {status}")

    def fail(self, cause: str) -> NoReturn:
        """Raises `ClusterError` with the cause and the tail of the log."""
        tail = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise ClusterError("\n".join([f"{self._name}: {cause}; the end of {self._log}:", *tail]))

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal and does not wait."""
        self._process.send_signal(number)

    def terminate(self, seconds: float = 60) -> int:
        """Asks the process to end and returns its exit status; one that does not end in time is killed and fails."""
        self._process.terminate()
        return self.wait(seconds)

    def wait(self, seconds: float = 60) -> int:
        """The exit status of a process that was asked to end; one that does not end in time is killed and fails."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.fail(f"did not end within {seconds} s of SIGTERM")

    def kill(self) -> None:
        """Ends the process at once and reaps it."""
        self._process.kill()
        self._process.wait()


def reserve_port(address: str = "127.0.0.1") -> socket.socket:
    """A socket that holds a free port of `address`: others don't get it, a listener with SO_REUSEADDR (Go's) does."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((address, 0))
    return held
