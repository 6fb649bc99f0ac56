"""Events on transitions: what the new status says that the old one did not."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.base import Condition
from trimtab_operator.api.reasons import REFUSALS, Reason
from trimtab_operator.api.status import Failures, FineTuneJobStatus, JobPhase, PrepareStatus, StagePhase, StageStatus
from trimtab_operator.core.actions import EventNote, EventType

_QUEUED = dict.fromkeys((reasons.WAITING_FOR_QUOTA.name, reasons.EVICTED.name), EventType.NORMAL)
"""How a queue works is no trouble."""


def transitions(old: FineTuneJobStatus, new: FineTuneJobStatus) -> tuple[EventNote, ...]:
    """The events that belong to one status write."""
    return tuple(_transitions(old, new))


def _transitions(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[EventNote]:
    if new.images and not old.images:
        yield _normal(reasons.IS_ACCEPTED, "the spec passed every check", "Accept")
    before = {stage.name: stage for stage in old.stages}
    yield from _failure("prepare", _failures(old.prepare), _failures(new.prepare))
    for stage in new.stages:
        was = before.get(stage.name)
        if stage.prepared and not (was and was.prepared):
            told = f"stage {stage.name}: {stage.prepared.records} records, {stage.prepared.tokens} tokens"
            yield _normal(reasons.IS_PREPARED, told, "Prepare")
        yield from _failure(f"stage {stage.name}", _failures(was), stage.failures)
        if stage.job_uid and stage.job_uid != (was and was.job_uid):
            yield EventNote(EventType.NORMAL, "AttemptStarted", f"stage {stage.name}, attempt {stage.attempt}", "Train")
        if stage.phase is StagePhase.SUCCEEDED and not (was and was.phase is StagePhase.SUCCEEDED) and stage.artifact:
            message = f"stage {stage.name}: {stage.artifact.uri} {stage.artifact.digest}"
            yield EventNote(EventType.NORMAL, "StageSucceeded", message, "Train")
    if new.phase is not old.phase:
        if new.phase is JobPhase.SUSPENDED:
            yield _normal(reasons.IS_SUSPENDED, "no pod is left", "Suspend")
        if new.phase is JobPhase.SUCCEEDED:
            yield _normal(reasons.COMPLETED, "every stage is done", "Finish")
        if new.phase is JobPhase.FAILED:
            message = next((c.message for c in new.conditions if c.type == reasons.FAILED), "")
            yield _warning(new.reason, message, "Finish")
    if new.phase not in (JobPhase.FAILED, JobPhase.SUCCEEDED, JobPhase.SUSPENDED):
        past, trouble = _trouble(old), _trouble(new)
        if trouble is not None and (past is None or past.reason != trouble.reason):
            yield _warning(trouble.reason, trouble.message, "Wait", _QUEUED.get(trouble.reason, EventType.WARNING))


def _failure(who: str, old: Failures | None, new: Failures | None) -> Iterator[EventNote]:
    if new and new.last and (old is None or old.count != new.count):
        message = f"{who}, attempt {new.last.attempt}: {new.last.message}"
        yield _warning(new.last.reason, message, "Train")


def _failures(status: PrepareStatus | StageStatus | None) -> Failures | None:
    return status.failures if status else None


def _normal(reason: Reason, message: str, action: str) -> EventNote:
    return EventNote(EventType.NORMAL, reason.name, message, action)


def _trouble(status: FineTuneJobStatus) -> Condition | None:
    """What keeps the job from getting on; None where it gets on."""
    return next((c for c in status.conditions if c.type == reasons.PROGRESSING and c.status == "False"), None)


def _warning(reason: str, message: str, action: str, type_: EventType = EventType.WARNING) -> EventNote:
    """What is wrong, and what to do as docs/status.md says."""
    known = next((each for each in (*reasons.all_reasons(), *REFUSALS) if each.name == reason), None)
    hint = f" Hint: {known.action}" if known is not None and known.action != Reason.action else ""
    return EventNote(type_, reason, f"{message}{hint}", action)
