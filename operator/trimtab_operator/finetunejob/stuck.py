"""Why an attempt's pods do not run, in words that stay the same while the cause stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.core.complaints import Complaint
from trimtab_operator.core.podproblems import Stuck, refused
from trimtab_operator.core.pods import PodView, pod_age
from trimtab_operator.finetunejob.observe import JobView

NO_POD_SECONDS = 60.0
SLOW_START_SECONDS = 300.0
LOST_SECONDS = 60.0
"""So long after the end of its grace period a deleted pod is not ending, but unheard of."""
_MOUNT_REASONS = ("FailedMount", "FailedAttachVolume", "FailedMountOnFilesystemMismatch")


@dataclass(frozen=True)
class Start:
    """Whether the pods of an attempt have started."""

    stuck: Stuck | None = None
    requeue: float | None = None
    """Seconds until time alone may change this."""
    overdue: bool = False
    """They should all have started by now, as `startingDeadlineSeconds` says."""


def starting(
    job: JobView,
    pods: Sequence[PodView],
    complaints: Mapping[str, Complaint],
    now: datetime,
    *,
    queue: str | None = None,
    deadline: int | None = None,
) -> Start:
    """What keeps the attempt's pods from running; nothing where they run, or have had too little time.

    Args:
        job: The attempt's Job.
        pods: Its pods.
        complaints: The newest Warning about a uid.
        now: The time.
        queue: The LocalQueue that the Job waits in.
        deadline: `startingDeadlineSeconds`; time in the queue does not count.
    """
    if job.finished:
        return Start()
    if job.suspended:
        return Start(_suspended(job, pods, queue))
    age = _seconds_since(job.started, now)
    live = [pod for pod in pods if not pod.deleting or pod.tracked]
    missing = job.size - job.succeeded - len(live)
    former = next((pod.name for pod in pods if pod not in live and not pod.over), None)
    if missing > 0 and former is not None:
        told = f"pod {former} saves a checkpoint and ends; the next pods wait for that"
        return Start(Stuck(reasons.EVICTED.name, told))
    cause = _missing(job, missing, age, complaints) if missing > 0 else _of_pods(pods, complaints, now)
    if deadline is None or (missing <= 0 and all(pod.phase != "Pending" for pod in live)):
        return cause
    left = deadline - age
    if left <= 0:
        return Start(cause.stuck, overdue=True)
    return Start(cause.stuck, min(left, cause.requeue or left))


def _suspended(job: JobView, pods: Sequence[PodView], queue: str | None) -> Stuck:
    ending = next((pod.name for pod in pods if not pod.over), None)
    if queue is None:
        told = (
            f"Job {job.name} is suspended, and not by this job's spec; Kueue does so to Jobs of namespaces it manages"
        )
        return Stuck(reasons.JOB_SUSPENDED.name, told)
    if ending is not None:
        told = f"queue {queue} took its quota back; pod {ending} saves a checkpoint and ends"
        return Stuck(reasons.EVICTED.name, told)
    told = f"Job {job.name} waits in queue {queue}; see kubectl get workloads -l kueue.x-k8s.io/job-uid={job.uid}"
    return Stuck(reasons.WAITING_FOR_QUOTA.name, told)


def _missing(job: JobView, missing: int, age: float, complaints: Mapping[str, Complaint]) -> Start:
    complaint = complaints.get(job.uid)
    if complaint is not None and complaint.reason == "FailedCreate":
        return Start(refused(f"Job {job.name}", complaint.note))
    if age < NO_POD_SECONDS:
        return Start(requeue=NO_POD_SECONDS - age)
    lacks = "has no pod" if missing == job.size else f"lacks {missing} of {job.size} pods"
    return Start(Stuck(reasons.NO_POD.name, f"Job {job.name} {lacks}; see kubectl describe job {job.name}"))


def _of_pods(pods: Sequence[PodView], complaints: Mapping[str, Complaint], now: datetime) -> Start:
    waiting = [pod for pod in sorted(pods, key=lambda pod: pod.index) if not pod.over]
    leaving = [LOST_SECONDS - _seconds_since(pod.gone_by, now) for pod in waiting if pod.gone_by]
    soon = min((left for left in leaving if left > 0), default=None)
    found = next((stuck for pod in waiting if (stuck := _named(pod, complaints, now)) is not None), None)
    if found is not None:
        return Start(found, soon)
    pending = [pod for pod in waiting if pod.phase == "Pending" and pod.node is not None]
    slow = next((pod for pod in pending if pod_age(pod, now) >= SLOW_START_SECONDS), None)
    if slow is not None:
        text = f"pod {slow.name} has not started on node {slow.node}; see kubectl describe pod {slow.name}"
        return Start(Stuck(reasons.SLOW_START.name, text), soon)
    times = [*(SLOW_START_SECONDS - pod_age(pod, now) for pod in pending), *([] if soon is None else [soon])]
    return Start(requeue=min(times, default=None))


def _named(pod: PodView, complaints: Mapping[str, Complaint], now: datetime) -> Stuck | None:
    where = f" on node {pod.node}" if pod.node else ""
    if pod.gone_by and _seconds_since(pod.gone_by, now) >= LOST_SECONDS:
        told = f"pod {pod.name}{where} was to end and does not: the node does not answer"
        return Stuck(reasons.NODE_LOST.name, f"{told}; once it is surely off, kubectl delete node {pod.node}")
    if pod.disrupted:
        return Stuck(
            reasons.DISRUPTED.name, f"pod {pod.name}{where} is taken away ({pod.disrupted}); waiting for its end"
        )
    complaint = complaints.get(pod.uid)
    if pod.stuck is None and pod.phase == "Pending" and complaint is not None and complaint.reason in _MOUNT_REASONS:
        return Stuck(reasons.MOUNT_FAILED.name, f"pod {pod.name}{where}: {complaint.note}")
    return pod.stuck


def _seconds_since(time: str, now: datetime) -> float:
    """0 where the time is not known."""
    return (now - datetime.fromisoformat(time)).total_seconds() if time else 0.0
