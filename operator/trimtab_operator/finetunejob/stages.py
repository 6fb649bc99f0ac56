"""One stage's status: from its step, its pods and its reports."""

from __future__ import annotations

from datetime import datetime

from pydantic import ValidationError

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.status import (
    ArtifactStatus,
    CheckpointStatus,
    Estimate,
    MetricValue,
    Prepared,
    StagePhase,
    StageProgress,
    StageStatus,
)
from trimtab_operator.core.conditions import timestamp
from trimtab_operator.core.podproblems import Stuck
from trimtab_operator.core.quantity import memory
from trimtab_operator.core.reports import clean
from trimtab_operator.finetunejob.attempts import State, Step
from trimtab_operator.finetunejob.reports import Problem
from trimtab_trainer.config import Metric, PreparedStage, PrepareReport, Progress, TrainReport

_MOST = 2**53


def after_prepare(stages: tuple[StageStatus, ...], report: PrepareReport) -> tuple[StageStatus, ...] | Problem:
    """The stages with what prepare found out; a Problem where a value is out of bounds."""
    try:
        return tuple(
            stage.model_copy(update={"prepared": _prepared(found), "estimate": _estimate(found)})
            for stage, found in zip(stages, report.stages, strict=True)
        )
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return Problem(reasons.REPORT_INVALID.name, f"the prepare report's {place} is out of bounds: {first['msg']}")


def after_success(stage: StageStatus, report: TrainReport, folder: str, now: datetime) -> StageStatus | Problem:
    """A stage whose attempt ended well; its message says where the result is not that of the last planned step."""
    try:
        progress = StageProgress(
            step=report.step,
            total_steps=report.total_steps,
            epoch=stage.progress.epoch if stage.progress else None,
            tokens_per_second=stage.progress.tokens_per_second if stage.progress else None,
            metrics=_metrics(report.metrics),
        )
    except ValidationError:
        return Problem(reasons.REPORT_INVALID.name, "the train report's steps are out of bounds; check the image")
    update: dict[str, object] = {
        "phase": StagePhase.SUCCEEDED,
        "completion_time": timestamp(now),
        "progress": progress,
        "artifact": ArtifactStatus(uri=f"{folder}/model", digest=report.digest),
        "message": _ending(report),
    }
    if report.checkpoints:
        update["checkpoints"] = [CheckpointStatus(step=c.step, digest=c.digest) for c in report.checkpoints[-10:]]
    return stage.model_copy(update=update)


def _ending(report: TrainReport) -> str:
    """Where the result does not have the weights of the last planned step: whose it has, and why."""
    if report.best_step is None:
        return ""
    if report.step < report.total_steps:
        return f"stopped early at step {report.step} of {report.total_steps}: validation best at {report.best_step}"
    return f"validation best at step {report.best_step} of {report.total_steps}, whose weights are the result"


def after_step(stage: StageStatus, step: Step, stuck: Stuck | None, suspend: bool, now: datetime) -> StageStatus:
    """A stage that is not done, after a step of its attempts."""
    record = step.record
    update: dict[str, object] = {
        "phase": _phase(step, stuck, suspend),
        "attempt": record.attempt,
        "job_uid": record.job_uid,
        "failures": record.failures if record.failures.count else None,
        "message": clean(stuck.message if stuck else step.message, 1024),
    }
    if record.job_uid and stage.start_time is None:
        update["start_time"] = timestamp(now)
    if step.state is State.FAILED:
        update["completion_time"] = timestamp(now)
    return stage.model_copy(update=update)


def with_progress(stage: StageStatus, progress: Progress | None) -> StageStatus:
    """A running stage with the newest answer of its /progress; the last one stays where there is none."""
    if progress is None:
        return stage
    known = StageProgress(
        step=bounded(progress.step),
        total_steps=bounded(progress.total_steps),
        epoch=clean(progress.epoch, 32) or None,
        tokens_per_second=bounded(progress.tokens_per_second),
        metrics=_metrics(progress.metrics),
    )
    checkpoints = [CheckpointStatus(step=bounded(c.step), digest=c.digest) for c in progress.checkpoints[-10:]]
    return stage.model_copy(update={"progress": known, "checkpoints": checkpoints})


def percent(stages: tuple[StageStatus, ...]) -> int:
    """Part of all steps that is done, rounded down; each stage counts the same where the steps are not known."""
    steps = [stage.estimate.steps if stage.estimate else 0 for stage in stages]
    weights = steps if all(steps) else [1] * len(stages)
    done = sum(weight * fraction(stage) for weight, stage in zip(weights, stages, strict=True))
    return int(100 * done / sum(weights) + 1e-9)


def fraction(stage: StageStatus) -> float:
    """Of its steps, done."""
    if stage.phase is StagePhase.SUCCEEDED:
        return 1.0
    if stage.progress is None or stage.progress.total_steps == 0:
        return 0.0
    return min(1.0, stage.progress.step / stage.progress.total_steps)


def bounded(value: int) -> int:
    """What the status may hold."""
    return max(0, min(_MOST, value))


def _phase(step: Step, stuck: Stuck | None, suspend: bool) -> StagePhase:
    match step.state:
        case State.STARTING:
            return StagePhase.QUEUED
        case State.IDLE:
            return StagePhase.SUSPENDED if suspend and step.record.attempt else StagePhase.PENDING
        case State.FAILED:
            return StagePhase.FAILED
        case _:
            return StagePhase.QUEUED if stuck else StagePhase.RUNNING


def _prepared(found: PreparedStage) -> Prepared:
    return Prepared(
        digest=found.digest,
        records=found.records,
        dropped=found.dropped,
        truncated=found.truncated,
        tokens=found.tokens,
    )


def _estimate(found: PreparedStage) -> Estimate:
    return Estimate(
        steps=found.steps,
        accelerator_memory=memory(bounded(found.memory_bytes)),
        seconds=found.seconds,
        tokens_per_second=found.tokens_per_second or None,
    )


def _metrics(metrics: list[Metric]) -> list[MetricValue]:
    """The first of each name, 32 at most."""
    named = {clean(metric.name, 64): clean(metric.value, 64) for metric in reversed(metrics)}
    kept = [(name, value) for name, value in reversed(named.items()) if name and value]
    return [MetricValue(name=name, value=value) for name, value in kept[:32]]
