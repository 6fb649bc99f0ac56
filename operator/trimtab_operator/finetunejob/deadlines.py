"""`activeDeadlineSeconds`: running time, not time queued or suspended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from trimtab_operator.api.status import FineTuneJobStatus
from trimtab_operator.core.conditions import timestamp


@dataclass(frozen=True)
class Clock:
    """Running time so far, for the status."""

    seconds: int
    """In periods that are over."""
    since: str | None
    """Start of the present period; None: nothing runs."""


def tick(status: FineTuneJobStatus, active: bool, now: datetime) -> Clock:
    """Start or stop the clock."""
    if active:
        return Clock(status.active_seconds, status.active_since or timestamp(now))
    return Clock(int(elapsed(status, now)), None)


def elapsed(status: FineTuneJobStatus, now: datetime) -> float:
    """Seconds for which the job has run, as the recorded status says."""
    since = status.active_since
    running = (now - datetime.fromisoformat(since)).total_seconds() if since else 0.0
    return status.active_seconds + max(0.0, running)


def remaining(status: FineTuneJobStatus, limit: int | None, now: datetime) -> float | None:
    """Seconds until the deadline, at most 0 once it has passed; None where there is none or nothing runs."""
    if limit is None:
        return None
    left = limit - elapsed(status, now)
    return left if status.active_since or left <= 0 else None
