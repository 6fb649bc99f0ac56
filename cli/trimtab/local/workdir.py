"""The working folder of local mode: where things lie, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_RELEASE_SECONDS = 15
"""How long the processes of a killed run may take to end; they hold the lock until then."""


class LocalError(Exception):
    """Local mode can't go on; the message names cause, place and remedy."""


class FolderInUse(LocalError):
    """Another `trimtab local` holds the folder."""


@dataclass(frozen=True)
class Workdir:
    """Paths below one working folder."""

    root: Path

    @property
    def state(self) -> Path:
        """The objects, as an SQLite database."""
        return self.root / "state.sqlite3"

    def claim(self, namespace: str, name: str) -> Path:
        """Directory of a PersistentVolumeClaim."""
        return self.root / "volumes" / namespace / name

    def pod(self, namespace: str, name: str) -> Path:
        """Directory of a pod: its log, its termination message, its ConfigMaps."""
        return self.root / "pods" / namespace / name

    def log(self, namespace: str, name: str) -> Path:
        """Standard output and error of a pod's container, over all restarts."""
        return self.pod(namespace, name) / "log"

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Hold the folder alone; gives the descriptor, which the pods' supervisors inherit.

        So the lock is free only when the last process of a killed run is gone.

        Raises:
            FolderInUse: another run holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(descriptor)
            holder = {"pid": os.getpid(), "since": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield descriptor
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + _RELEASE_SECONDS
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            holder = _holder(os.pread(descriptor, 4096, 0))
            if holder is None or _alive(holder[0]) or time.monotonic() > deadline:
                who = "another process" if holder is None else f"process {holder[0]} since {holder[1]}"
                raise FolderInUse(f"{self.root}: in use by {who}; wait for it, stop it, or choose another --workdir")
            time.sleep(0.1)


def _holder(text: bytes) -> tuple[int, str] | None:
    try:
        holder = json.loads(text)
        return int(holder["pid"]), str(holder["since"])
    except (ValueError, KeyError, TypeError):
        return None


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
