"""How much memory a process holds, and held at most."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""See proc_pid_clear_refs(5)."""


def memory_of(device: torch.device) -> HostMemory | DeviceMemory:
    """Of this process on the device; on the CPU all of it."""
    return DeviceMemory(device) if device.type == "cuda" else HostMemory()


def memory_size(device: torch.device) -> int:
    """Bytes that the device has, or the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class DeviceMemory:
    """What torch has reserved on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used(self) -> int:
        """Bytes now."""
        return int(torch.cuda.memory_reserved(self._device))

    def peak(self) -> int:
        """The most since `reset`."""
        return int(torch.cuda.max_memory_reserved(self._device))

    def reset(self) -> None:
        """Count the peak from now on."""
        torch.cuda.reset_peak_memory_stats(self._device)


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
