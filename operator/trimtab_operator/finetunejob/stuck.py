"""Why an attempt's pods do not run, in words that stay the same while the cause stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.core.pods import PodView, Stuck, pod_age
from trimtab_operator.finetunejob.observe import JobView

NO_POD_SECONDS = 60.0
SLOW_START_SECONDS = 300.0


@dataclass(frozen=True)
class Start:
    """Whether the pods of an attempt have started."""

    stuck: Stuck | None = None
    requeue: float | None = None
    """Seconds until time alone may change this."""


def starting(job: JobView, pods: Sequence[PodView], now: datetime) -> Start:
    """What keeps the attempt's pods from running; nothing where they run, or have had too little time."""
    if job.finished:
        return Start()
    if not pods:
        age = (now - datetime.fromisoformat(job.created)).total_seconds() if job.created else 0.0
        if age < NO_POD_SECONDS:
            return Start(requeue=NO_POD_SECONDS - age)
        return Start(Stuck(reasons.NO_POD.name, f"Job {job.name} has no pod; see kubectl describe job {job.name}"))
    waiting = [pod for pod in sorted(pods, key=lambda pod: pod.index) if not pod.over]
    found = next((stuck for pod in waiting if (stuck := _named(pod)) is not None), None)
    if found is not None:
        return Start(found)
    pending = [pod for pod in waiting if pod.phase == "Pending" and pod.node is not None]
    slow = next((pod for pod in pending if pod_age(pod, now) >= SLOW_START_SECONDS), None)
    if slow is not None:
        text = f"pod {slow.name} has not started on node {slow.node}; see kubectl describe pod {slow.name}"
        return Start(Stuck(reasons.SLOW_START.name, text))
    return Start(requeue=min((SLOW_START_SECONDS - pod_age(pod, now) for pod in pending), default=None))


def _named(pod: PodView) -> Stuck | None:
    if pod.disrupted:
        where = f" on node {pod.node}" if pod.node else ""
        return Stuck(
            reasons.DISRUPTED.name, f"pod {pod.name}{where} is taken away ({pod.disrupted}); waiting for its end"
        )
    return pod.stuck
