"""Attempts: their numbers, how they end, and when the next one starts.

One attempt is one Job. Its number is one more than any that the status or a child's label names; it is written to the
status before the Job is created, and used up once the status records that Job's uid. Until then the same number is
created again. The next attempt waits until no pod of an earlier one is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.status import Failure, Failures, PrepareStatus, StageStatus
from trimtab_operator.core.pods import PodView
from trimtab_operator.core.reports import clean, failure_report
from trimtab_operator.finetunejob.observe import JobView
from trimtab_trainer.config import ExitCode

FINAL_CODES = (ExitCode.BAD_CONFIGURATION, ExitCode.BAD_DATA, ExitCode.INPUT_MISSING, ExitCode.TRAINING_FAILED)
"""Asking again would give the same."""
FIRST_DELAY = 10.0
LONGEST_DELAY = 300.0
FREE_DELAY = 1.0
"""Seconds before an attempt that follows a preemption; none may loop hotly."""
_TOLD_TO_STOP = (ExitCode.PREEMPTED, 128 + 15)
EVIDENCE_SECONDS = 30.0
"""How long a finished Job waits for its pods' last words: Jobs and pods come by different watches."""

_REASONS = {
    ExitCode.BAD_CONFIGURATION: "BadConfiguration",
    ExitCode.BAD_DATA: "BadData",
    ExitCode.INPUT_MISSING: "InputMissing",
    ExitCode.TRAINING_FAILED: "TrainingFailed",
    ExitCode.STALLED: "Stalled",
    ExitCode.STORAGE_ERROR: "StorageError",
    ExitCode.KILLED: "Killed",
}


class State(StrEnum):
    """Where prepare or a stage is with its attempts."""

    IDLE = "Idle"
    """Nothing exists, nothing may start."""
    STARTING = "Starting"
    RUNNING = "Running"
    BACKOFF = "Backoff"
    STOPPING = "Stopping"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class Record:
    """What the status says about the newest attempt."""

    attempt: int = 0
    job_uid: str | None = None
    failures: Failures = field(default_factory=Failures)

    @classmethod
    def of(cls, status: PrepareStatus | StageStatus | None) -> Record:
        """The record of prepare or of a stage; of nothing where there is none."""
        if status is None:
            return cls()
        return cls(status.attempt, status.job_uid, status.failures or Failures())

    @property
    def failed_already(self) -> bool:
        """The newest attempt's failure is recorded."""
        return self.failures.last is not None and self.failures.last.attempt == self.attempt


@dataclass(frozen=True)
class Step:
    """What to do now about one role."""

    state: State
    record: Record
    """For the status."""
    create: bool = False
    """Create the children of `record.attempt`; only where the observed status has it reserved."""
    delete: tuple[JobView, ...] = ()
    confirm: bool = False
    """There has been a Job, and it is taken to be gone with its pods, as none is seen."""
    message: str = ""
    lead: PodView | None = None
    """After success: the pod with the report, None where it is gone."""
    requeue: float | None = None


@dataclass(frozen=True)
class Interrupted:
    """An attempt ended through no fault of its own; the next one is free."""

    reason: str
    ended_at: str = ""


@dataclass(frozen=True)
class Succeeded:
    """Every pod of the attempt ended well."""

    lead: PodView | None


@dataclass(frozen=True)
class Failed:
    """An attempt ended badly."""

    failure: Failure
    final: bool
    ended_at: str = ""


def advance(
    record: Record,
    jobs: Sequence[JobView],
    pods: Sequence[PodView],
    *,
    highest_label: int = 0,
    retries: int,
    may_start: bool,
    stop: bool,
    now: datetime,
) -> Step:
    """The next step of one role. `stop`: end what runs; `may_start`: a new attempt is wanted and allowed."""
    current = next((job for job in jobs if record.job_uid is not None and job.uid == record.job_uid), None)
    if current is None and record.job_uid is None and record.attempt > 0:
        mine = next((job for job in jobs if job.attempt == record.attempt), None)
        if mine is not None:
            return Step(State.RUNNING, replace(record, job_uid=mine.uid))
    strays = tuple(job for job in jobs if job is not current and not job.deleting)
    if current is not None:
        step = _of_current(record, current, [pod for pod in pods if pod.owner_uid == current.uid], retries, stop, now)
        return replace(step, delete=(*strays, *step.delete))
    if jobs or pods:
        left = ", ".join(pod.name for pod in pods[:3]) or jobs[0].name
        return Step(State.STOPPING, record, delete=strays, message=f"waiting until {left} is gone")
    if not may_start or stop:
        return Step(State.IDLE, record)
    highest = max(record.attempt, highest_label)
    if record.job_uid is None and 0 < record.attempt == highest:
        return Step(State.STARTING, record, create=True, confirm=highest_label == highest)
    return Step(State.STARTING, replace(record, attempt=highest + 1, job_uid=None), confirm=highest > 0)


def _of_current(record: Record, job: JobView, pods: Sequence[PodView], retries: int, stop: bool, now: datetime) -> Step:
    remove = () if job.deleting else (job,)
    match outcome(record.attempt, job, pods, now):
        case Succeeded(lead):
            return Step(State.SUCCEEDED, record, lead=lead)
        case Interrupted(reason, ended_at):
            message = f"attempt {record.attempt} was interrupted ({reason})"
            if not stop and (wait := _remaining(ended_at, FREE_DELAY, now)) > 0:
                return Step(State.STOPPING, record, message=message, requeue=wait)
            return Step(State.STOPPING, record, delete=remove, message=message)
        case Failed(failure, final, ended_at):
            return _after_failure(record, failure, final, ended_at, remove, retries, stop, now)
        case None:
            if stop:
                return Step(State.STOPPING, record, delete=remove, message="saving a checkpoint and stopping")
            waiting = EVIDENCE_SECONDS if job.finished else None
            return Step(State.RUNNING, record, requeue=waiting)


def _after_failure(
    record: Record,
    failure: Failure,
    final: bool,
    ended_at: str,
    remove: tuple[JobView, ...],
    retries: int,
    stop: bool,
    now: datetime,
) -> Step:
    recorded = record.failed_already
    if not recorded:
        record = replace(record, failures=Failures(count=record.failures.count + 1, last=failure))
    failure = record.failures.last or failure
    told = f"attempt {failure.attempt} failed ({failure.reason})"
    if final or record.failures.count > retries:
        return Step(State.FAILED, record, message=failure.message)
    wait = 0.0 if stop else _remaining(ended_at, retry_delay(record.failures.count), now)
    if not recorded or wait > 0:
        return Step(State.BACKOFF, record, message=f"{told}: {failure.message}", requeue=wait if recorded else None)
    return Step(State.STOPPING, record, delete=remove, message=f"{told}: {failure.message}")


def outcome(
    attempt: int, job: JobView, pods: Sequence[PodView], now: datetime
) -> Interrupted | Succeeded | Failed | None:
    """How the attempt ended; None while it goes on."""
    pods = counted(job, pods)
    late = job.finished and _remaining(job.ended_at, EVIDENCE_SECONDS, now) <= 0
    if job.complete:
        lead = next((pod for pod in pods if pod.index == 0 and pod.over), None)
        return Succeeded(lead) if lead or late else None
    disrupted = next((pod.disrupted for pod in pods if pod.disrupted), None)
    failed = sorted((pod for pod in pods if pod.failed), key=_order)
    if disrupted and (failed or job.failed):
        return Interrupted(disrupted, next((pod.ended.finished_at for pod in failed if pod.ended), ""))
    if failed:
        first = failed[0]
        ended_at = first.ended.finished_at if first.ended else job.ended_at
        if first.ended and first.ended.exit_code == ExitCode.PREEMPTED:
            return Interrupted("Preempted", ended_at)
        return Failed(failure_of(attempt, first), _is_final(first), ended_at)
    if job.failed and late:
        message = f"Job {job.name} failed ({job.failed}) and its pods are gone: {job.message}"
        failure = Failure(attempt=attempt, reason=reasons.POD_GONE.name, message=clean(message, 1024))
        return Failed(failure, False, job.ended_at)
    return None


def counted(job: JobView, pods: Sequence[PodView]) -> list[PodView]:
    """Without those that a suspension removed: the Job controller took its finalizer and does not count their end."""
    suspension = job.was_suspended and not job.failing
    return [pod for pod in pods if pod.tracked or not pod.deleting or not suspension]


def failure_of(attempt: int, pod: PodView) -> Failure:
    """What a failed pod says about itself; the kubelet's word on memory wins over the pod's own."""
    node = pod.node
    if pod.ended is None:
        message = pod.message or "the pod ended without running its container"
        return Failure(attempt=attempt, reason=pod.reason or "Error", message=clean(message, 1024), node=node)
    code = pod.ended.exit_code
    report = failure_report(pod.ended.message)
    named = _REASONS.get(ExitCode(code)) if code in list(ExitCode) else None
    if pod.ended.reason == "OOMKilled":
        limit = f" (limit {pod.memory_limit})" if pod.memory_limit else ""
        told = f"pod {pod.name} ran out of memory{limit}; raise its memory limit or lower microBatchSize"
        reason, message = "OOMKilled", told
    elif report is not None:
        reason, message = report.reason, report.message
    else:
        reason = named or ("Killed" if code > 128 else "Error")
        message = f"pod {pod.name} ended with exit code {code} and left no report; see kubectl logs {pod.name}"
    return Failure(attempt=attempt, exit_code=code, reason=reason, message=clean(message, 1024), node=node)


def retry_delay(failures: int) -> float:
    """Seconds between the end of an attempt and the next, after so many failures.

    >>> [retry_delay(n) for n in (1, 2, 3, 10)]
    [10.0, 20.0, 40.0, 300.0]
    """
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** (failures - 1))


def _is_final(pod: PodView) -> bool:
    return pod.ended is not None and pod.ended.exit_code in FINAL_CODES


def _order(pod: PodView) -> tuple[str, int, int]:
    """The first to end is the cause; in one second: a signal, then an error, then who was told to stop."""
    code = pod.ended.exit_code if pod.ended else 0
    rank = 2 if code in _TOLD_TO_STOP else 0 if code > 128 else 1
    return (pod.ended.finished_at if pod.ended else "", rank, pod.index)


def _remaining(since: str, delay: float, now: datetime) -> float:
    """Seconds until `delay` has passed since a time; 0 where the time is not known."""
    return max(0.0, delay - (now - datetime.fromisoformat(since)).total_seconds()) if since else 0.0
