"""Events on transitions: what the new status says that the old one did not."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.reasons import Reason
from trimtab_operator.api.status import Failures, FineTuneJobStatus, JobPhase, PrepareStatus, StagePhase, StageStatus
from trimtab_operator.core.actions import EventNote, EventType


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
            yield EventNote(EventType.WARNING, new.reason, message, "Finish")


def _failure(who: str, old: Failures | None, new: Failures | None) -> Iterator[EventNote]:
    if new and new.last and (old is None or old.count != new.count):
        message = f"{who}, attempt {new.last.attempt}: {new.last.message}"
        yield EventNote(EventType.WARNING, new.last.reason, message, "Train")


def _failures(status: PrepareStatus | StageStatus | None) -> Failures | None:
    return status.failures if status else None


def _normal(reason: Reason, message: str, action: str) -> EventNote:
    return EventNote(EventType.NORMAL, reason.name, message, action)
