"""Stages as processes that start at once: forks of one that has imported everything, instead of new interpreters.

What is replaced is `torchrun` and the interpreter's start alone: supervisor, training processes and the signals between
them are the real ones. `test_resume.py` and `test_failures.py` start everything anew, as a container does.

Run as a module, this is the process to fork from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.supervisor import supervise
from trimtab_trainer.supervisor.processes import PARENT_VARIABLE
from trimtab_trainer.supervisor.run_folder import RUN_FOLDER_VARIABLE, RunFolder

THREADS = 1
"""Of each process; torch reads it once, at its import."""


class Forked:
    """A container's first process, with what tests use of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, output: Path) -> None:
        self._connection = connection.makefile("r")
        self._output = output
        self.pid = int(self._connection.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, once it has ended."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._connection.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit code."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("stage", timeout or 0)
            self.returncode = int(self._connection.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; returns what it wrote."""
        self.wait(timeout)
        return self._output.read_text(encoding="utf-8", errors="replace"), None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def start(config: TrainConfig, file: Path, environment: Mapping[str, str]) -> Forked:
    """Run the stage of `file` in a fork."""
    assert config.threads == THREADS
    output = file.with_name(f"output-{time.monotonic_ns()}.txt")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_parent())
    request = {"arguments": [str(file)], "environment": dict(environment), "output": str(output)}
    connection.sendall(json.dumps(request).encode() + b"\n")
    return Forked(connection, output)


@cache
def _parent() -> str:
    """Address of the process to fork from, which ends with this one."""
    folder = tempfile.mkdtemp(prefix="forks-")
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, folder],
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.strip() == b"ready":
            break
    else:
        raise RuntimeError("the process to fork from ended")
    _kept.append(process)
    return f"{folder}/socket"


_kept: list[subprocess.Popen[bytes]] = []


class _Torchrun:
    """Instead of the process `torchrun`: its training processes as forks of the supervisor."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], start_new_session: bool) -> None:
        options = dict(part[2:].split("=", 1) for part in command if part.startswith("--") and "=" in part)
        self._run = RunFolder(Path(env[RUN_FOLDER_VARIABLE]))
        self.returncode: int | None = None
        size = int(options["nproc-per-node"])
        world = {"WORLD_SIZE": size, "MASTER_ADDR": options["master-addr"], "MASTER_PORT": options["master-port"]}
        self._running: dict[int, int] = {}
        for rank in range(size):
            added = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, PARENT_VARIABLE: os.getpid(), **world}
            variables = {**env, **{name: str(value) for name, value in added.items()}}
            self._running[_fork(partial(_work, command[-1], variables))] = rank

    def poll(self) -> int | None:
        """1 once a process has failed and the others are killed, 0 once all have ended well."""
        for pid, rank in list(self._running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._running[pid]
            if code := os.waitstatus_to_exitcode(status):
                self._run.write_exit_codes({rank: code})
                self.kill()
                break
        if not self._running and self.returncode is None:
            self.returncode = 0
        return self.returncode

    def kill(self) -> None:
        """End all."""
        self.returncode = 1
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._running = {}

    def wait(self) -> None:
        """They have ended when `poll` or `kill` says so."""


def _work(file: str, environment: Mapping[str, str]) -> int:
    from trimtab_trainer.engine import worker

    os.setsid()
    _become(["worker", file], environment)
    logging.getLogger().handlers.clear()  # the container's
    return worker.main()


def _contain(request: dict[str, Any]) -> int:
    from trimtab_trainer import __main__

    os.setsid()
    _become(["trimtab_trainer", *request["arguments"]], request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    supervise.subprocess = type("forks", (), {"Popen": _Torchrun})  # type: ignore[assignment]
    return __main__.main()


def _become(arguments: list[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    tempfile.tempdir = None


def _fork(main: Callable[[], int]) -> int:
    """Process id of a child that ends with what `main` returns."""
    sys.stdout.flush()
    pid = os.fork()
    return pid or _end(main)


def _end(main: Callable[[], int]) -> NoReturn:
    code = 1
    try:
        code = main()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(folder: str) -> None:
    # The first half of this, with torch's compiler, is what each DeepSpeed engine would import at its start.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import matplotlib.figure  # noqa: F401

    from trimtab_trainer.engine import build, rollout, train, worker  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads do not survive a fork"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/socket")
    listener.listen()
    print("ready", flush=True)
    os.dup2(2, 1)
    waiting: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([listener.fileno(), 0, *waiting], [], [])
        if 0 in ready:  # the tests have ended
            return
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            request = json.loads(connection.makefile("r").readline())
            pid = _fork(partial(_contain, request))
            connection.sendall(f"{pid}\n".encode())
            waiting[os.pidfd_open(pid)] = (pid, connection)
        for descriptor in [each for each in ready if each in waiting]:
            pid, connection = waiting.pop(descriptor)
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()
            os.close(descriptor)


if __name__ == "__main__":
    _serve(sys.argv[1])
