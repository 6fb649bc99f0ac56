"""How much memory a process holds, and held at most."""

from __future__ import annotations

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""See proc_pid_clear_refs(5)."""


class HostMemory:
    """Of this process, as Linux counts it: anonymous pages and the pages of mapped files."""

    def used(self) -> int:
        """Bytes resident now."""
        return _kilobytes("VmRSS") * 1024

    def peak(self) -> int:
        """The most since `reset`."""
        return _kilobytes("VmHWM") * 1024

    def reset(self) -> None:
        """Count the peak from now on."""
        _CLEAR.write_text(_RESET_PEAK)


def _kilobytes(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
