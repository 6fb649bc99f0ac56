"""The results as a Markdown table, and its place in `bench/README.md`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.operator.run import Run
from bench.operator.wakeup import percentile

BEGIN, END = "<!-- bench-operator: begin -->", "<!-- bench-operator: end -->"


def _writes(run: Run) -> str:
    total = sum(run.writes_per_job.values())
    kinds = ", ".join(f"{resource} {count:.1f}" for resource, count in run.writes_per_job.items())
    return f"{total:.1f} ({kinds})"


def _floor(run: Run) -> float:
    return run.floor.children if run.floor else float("nan")


def _told(run: Run, share: float) -> str:
    return f"{1000 * percentile(run.told_after, share):.0f}"


def _outage(run: Run) -> str:
    return f"{run.back_seconds:.1f} after {run.outage_seconds:.0f}" if run.outage_seconds else "not run"


ROWS: dict[str, Callable[[Run], str]] = {
    "jobs a second, from the first POST to the last Complete": lambda r: f"{r.jobs / r.complete_seconds:.1f}",
    "seconds until all jobs are complete": lambda r: f"{r.complete_seconds:.1f}",
    "… of the bare loop, which waits for no pod": lambda r: f"{r.floor.whole:.1f}" if r.floor else "",
    "seconds until the children of all jobs exist": lambda r: f"{r.children_seconds:.1f}",
    "… of the bare loop": lambda r: f"{_floor(r):.1f}",
    "… ratio (goal: at most 1.5)": lambda r: f"{r.children_seconds / _floor(r):.2f}",
    "API writes a job": _writes,
    "most status writes of one job (goal: at most 6)": lambda r: str(r.status_writes_most),
    "wake-up at rest, 99th percentile, ms (goal: at most 50)": lambda r: f"≤ {1000 * r.wake_up_bound:g}",
    "… counted": lambda r: str(r.wake_ups_counted),
    "a Job's end until the status tells of it, median, ms": lambda r: _told(r, 0.5),
    "… 99th percentile, ms": lambda r: _told(r, 0.99),
    "most keys in the work queue": lambda r: str(r.queue_depth_most),
    "most open connections": lambda r: str(r.connections_most),
    "most resident memory, MB (goal: at most 350)": lambda r: f"{r.resident_most:.0f}",
    "resident memory at rest, MB": lambda r: f"{r.resident_at_rest:.0f}",
    "CPU at rest, % of one core (goal: at most 2)": lambda r: f"{r.cpu_at_rest:.1f}",
    "CPU a job, ms": lambda r: f"{1000 * r.cpu_busy_seconds / r.jobs:.0f}",
    "seconds from a restart to leading": lambda r: f"{r.restart_seconds:.1f}",
    "writes by a restart and a periodic list (goal: 0)": lambda r: str(r.writes_at_rest),
    "seconds until back, after so many seconds of 503 (goal: at most 30)": _outage,
}


def table(runs: Sequence[Run]) -> str:
    """One row a measure, one column a size."""
    lines = [
        "| | " + " | ".join(f"{run.jobs:,} jobs" for run in runs) + " |",
        "| --- |" + " ---: |" * len(runs),
        *(f"| {name} | " + " | ".join(cell(run) for run in runs) + " |" for name, cell in ROWS.items()),
    ]
    return "\n".join(lines)


def machine() -> str:
    """The machine that all of it ran on, in one line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{os.cpu_count()} × {model}, {memory:.0f} GB, Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}; the control plane, KWOK and the operator share it."
    )


def write(file: Path, text: str) -> None:
    """Put the text between the two marks of a file."""
    whole = file.read_text()
    head, tail = whole[: whole.index(BEGIN) + len(BEGIN)], whole[whole.index(END) :]
    file.write_text(f"{head}\n{text}\n{tail}")
