"""The whole status of a FineTuneJob, from what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.status import (
    ArtifactStatus,
    EndpointStatus,
    FineTuneJobStatus,
    Images,
    JobPhase,
    JobProgress,
    PrepareStatus,
    StagePhase,
    StageStatus,
)
from trimtab_operator.core.conditions import set_condition, timestamp
from trimtab_operator.core.kube import Object
from trimtab_operator.core.plainjson import compact
from trimtab_operator.finetunejob.deadlines import Clock
from trimtab_operator.finetunejob.remaining import Remaining, guessed_remaining, told_remaining
from trimtab_operator.finetunejob.stages import percent
from trimtab_trainer.config import Progress


@dataclass(frozen=True)
class Because:
    """A reason with its message."""

    reason: str
    message: str = ""


@dataclass(frozen=True)
class Findings:
    """Everything that the status says."""

    generation: int
    images: Images | None
    model: ArtifactStatus | None
    prepare: PrepareStatus | None
    stages: tuple[StageStatus, ...]
    endpoint: EndpointStatus | None
    clock: Clock
    now: Because
    """What is going on, or why nothing is."""
    phase: JobPhase
    moving: bool
    """Progressing is True."""
    rejected: Because | None = None
    """Accepted is False."""
    prepared: bool = False
    suspend: bool = False
    idle: bool = False
    """No pod is left."""
    rolled_out: bool | None = None
    """None: the job has no rollout."""
    progress: Mapping[str, Progress] = field(default_factory=dict)


def build(old: FineTuneJobStatus, found: Findings, now: datetime) -> Object:
    """The status as the API server is to hold it."""
    terminal = found.phase in (JobPhase.SUCCEEDED, JobPhase.FAILED)
    running = next((s.name for s in found.stages if s.phase in (StagePhase.RUNNING, StagePhase.QUEUED)), None)
    remaining = None if terminal else _remaining(old.progress, running, found)
    share = percent(found.stages) if found.stages else 0
    status = FineTuneJobStatus(
        observed_generation=found.generation,
        phase=found.phase,
        reason=found.now.reason,
        progress_text=f"{share}%",
        remaining_text=remaining.text if remaining else "",
        start_time=old.start_time or (timestamp(now) if found.images else None),
        completion_time=timestamp(now) if terminal else None,
        active_seconds=found.clock.seconds,
        active_since=found.clock.since,
        images=found.images,
        model=found.model,
        prepare=found.prepare,
        progress=JobProgress(
            stage=running,
            percent=share,
            estimated_remaining_seconds=remaining.seconds if remaining else None,
            guessed_at_tokens_per_second=remaining.guessed_at if remaining else None,
        ),
        stages=list(found.stages),
        endpoint=found.endpoint,
    )
    return {**dump(status), "conditions": _conditions(old, found, now)}


def _remaining(old: JobProgress | None, running: str | None, found: Findings) -> Remaining | None:
    """What a running stage says, else what it said last, else what prepare guessed."""
    told = told_remaining(found.stages, found.progress)
    if told is None and running and old and old.stage == running and old.estimated_remaining_seconds is not None:
        return Remaining(old.estimated_remaining_seconds, old.guessed_at_tokens_per_second)
    return told or guessed_remaining(found.stages)


def dump(status: FineTuneJobStatus) -> Object:
    """A status as JSON, without what is absent or empty: the API server need not keep the difference."""
    return compact(status.model_dump(mode="json", by_alias=True, exclude_none=True))


def condition_list(status: FineTuneJobStatus) -> list[Object]:
    """The conditions as plain data."""
    return [c.model_dump(mode="json", by_alias=True, exclude_none=True) for c in status.conditions]


def _conditions(old: FineTuneJobStatus, found: Findings, now: datetime) -> list[Object]:
    conditions = condition_list(old)
    for kind, (status, because) in _verdicts(found).items():
        conditions = set_condition(conditions, kind, status, because.reason, because.message, found.generation, now)
    return conditions


def _verdicts(found: Findings) -> dict[str, tuple[bool, Because]]:
    """Condition to its status and reason, in the order in which they first appear."""
    verdicts = {
        reasons.ACCEPTED: (found.rejected is None, found.rejected or Because(reasons.IS_ACCEPTED.name)),
        reasons.PREPARED: _prepared(found),
        reasons.SUSPENDED: _suspended(found),
    }
    if found.rolled_out is not None:
        verdicts[reasons.ROLLED_OUT] = _rolled_out(found.rolled_out, found)
    match found.phase:
        case JobPhase.SUCCEEDED:
            verdicts[reasons.PROGRESSING] = (False, Because(reasons.FINISHED.name))
            verdicts[reasons.COMPLETE] = (True, found.now)
        case JobPhase.FAILED:
            verdicts[reasons.PROGRESSING] = (False, Because(reasons.FINISHED.name))
            verdicts[reasons.FAILED] = (True, found.now)
        case _:
            verdicts[reasons.PROGRESSING] = (found.moving, found.now)
    return verdicts


def _prepared(found: Findings) -> tuple[bool, Because]:
    if found.prepared:
        return True, Because(reasons.IS_PREPARED.name)
    if found.phase is JobPhase.FAILED:
        return False, found.now
    return False, Because((reasons.PREPARING if found.prepare else reasons.NOT_PREPARED).name)


def _suspended(found: Findings) -> tuple[bool, Because]:
    if not found.suspend:
        return False, Because(reasons.NOT_SUSPENDED.name)
    if found.idle:
        return True, Because(reasons.IS_SUSPENDED.name, "set spec.suspend to false to go on")
    return False, Because(reasons.SUSPENDING.name)


def _rolled_out(done: bool, found: Findings) -> tuple[bool, Because]:
    if done:
        return True, Because(reasons.IS_ROLLED_OUT.name)
    if all(stage.phase is StagePhase.SUCCEEDED for stage in found.stages) and found.stages:
        return False, found.now
    return False, Because(reasons.NOT_ROLLED_OUT.name)
