"""`ttlSecondsAfterFinished`: a finished job goes; artifacts and endpoint stay."""

from __future__ import annotations

from datetime import datetime

from trimtab_operator.api.finetunejob import FineTuneJob


def expires_in(job: FineTuneJob, now: datetime) -> float | None:
    """Seconds until the finished job is to be deleted, 0 or less when it is due; None: never."""
    ttl, end = job.spec.ttl_seconds_after_finished, job.status.completion_time
    if ttl is None or end is None:
        return None
    return ttl - (now - datetime.fromisoformat(end)).total_seconds()
