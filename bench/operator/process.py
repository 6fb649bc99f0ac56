"""What the kernel says of a process: memory, CPU time, connections."""

from __future__ import annotations

import os
from pathlib import Path

MEGABYTE = 1e6
_TICKS = os.sysconf("SC_CLK_TCK")


class Watched:
    """A running process, by its id; Linux."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._folder = Path("/proc", str(pid))

    def resident(self) -> float:
        """Resident memory now, in MB."""
        return self._kilobytes("VmRSS") * 1024 / MEGABYTE

    def most_resident(self) -> float:
        """The most that it ever was, in MB."""
        return self._kilobytes("VmHWM") * 1024 / MEGABYTE

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far, user and system."""
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def connections(self) -> int:
        """Open sockets."""
        count = 0
        for entry in (self._folder / "fd").iterdir():
            try:
                count += entry.readlink().name.startswith("socket:")
            except FileNotFoundError:  # closed meanwhile
                continue
        return count

    def _kilobytes(self, field: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
