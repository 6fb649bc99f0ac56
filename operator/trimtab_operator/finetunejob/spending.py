"""What the attempts that end with a status write have cost, in seconds of accelerators."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.status import FineTuneJobStatus, StagePhase, StageStatus
from trimtab_operator.core.actions import Spent
from trimtab_operator.core.pods import PodView
from trimtab_operator.finetunejob.attempts import Interrupted, counted, outcome
from trimtab_operator.finetunejob.merge import accelerators, effective
from trimtab_operator.finetunejob.observe import JobView, Observation


def spending(job: FineTuneJob, new: FineTuneJobStatus, seen: Observation, now: datetime) -> tuple[Spent, ...]:
    """Running time of the pods times their accelerators, for each attempt that `new` says has ended and `job` does not.

    An eviction by Kueue ends no attempt, but what ran until then is counted as interrupted.
    """
    before = {stage.name: stage for stage in job.status.stages}
    ends = list(_ends(job, before, new, seen, now))
    devices = {stage.name: accelerators(stage.stage) for stage in effective(job.spec)} if ends else {}
    costs = [(how, devices[name] * sum(_ran(pod, now) for pod in pods)) for name, how, pods in ends]
    return tuple(Spent(how, seconds) for how, seconds in costs if seconds > 0)


def _ends(
    job: FineTuneJob, before: dict[str, StageStatus], new: FineTuneJobStatus, seen: Observation, now: datetime
) -> Iterator[tuple[str, str, list[PodView]]]:
    """Stage, outcome and pods of each end."""
    for stage in new.stages:
        old = before.get(stage.name)
        view = next((each for each in seen.jobs if old and each.uid == old.job_uid), None)
        if old is None or view is None:
            continue
        pods = [pod for pod in seen.pods if pod.owner_uid == view.uid]
        if _evicted(old, stage, view):
            yield stage.name, "interrupted", pods
        elif how := _end(job, old, stage, view, pods, now):
            yield stage.name, how, counted(view, pods)


def _evicted(old: StageStatus, new: StageStatus, view: JobView) -> bool:
    return view.suspended and not view.failing and (old.phase, new.phase) == (StagePhase.RUNNING, StagePhase.QUEUED)


def _end(
    job: FineTuneJob, old: StageStatus, new: StageStatus, view: JobView, pods: list[PodView], now: datetime
) -> str | None:
    """How the recorded attempt ended with this status; None where it goes on, or its end was recorded before."""
    if new.phase is StagePhase.SUCCEEDED:
        return "succeeded" if old.phase is not StagePhase.SUCCEEDED else None
    if old.failures and old.failures.last and old.failures.last.attempt == old.attempt:
        return None
    if (new.failures and new.failures != old.failures) or new.phase is StagePhase.FAILED:
        return "failed" if old.phase is not StagePhase.FAILED else None
    if new.message == old.message:
        return None
    found = outcome(old.attempt, view, pods, now)
    stopped = found is None and job.spec.suspend and not view.suspended
    return "interrupted" if stopped or isinstance(found, Interrupted) else None


def _ran(pod: PodView, now: datetime) -> float:
    """Seconds for which the pod's container ran; 0 where it never did."""
    if not pod.running_since:
        return 0.0
    end = datetime.fromisoformat(pod.ended.finished_at) if pod.ended and pod.ended.finished_at else now
    return max(0.0, (end - datetime.fromisoformat(pod.running_since)).total_seconds())
