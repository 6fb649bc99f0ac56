"""What to do next for a FineTuneJob. Pure: the same arguments give the same plan."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.base import complaint
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.status import FineTuneJobStatus, Images, JobPhase, StagePhase
from trimtab_operator.core.actions import Action, Apply, Delete, Plan
from trimtab_operator.core.kube import FINETUNEJOB, Object
from trimtab_operator.core.reports import clean
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob import deadlines
from trimtab_operator.finetunejob.acceptance import Question, Verdict, verdict
from trimtab_operator.finetunejob.attempts import State
from trimtab_operator.finetunejob.events import transitions
from trimtab_operator.finetunejob.merge import effective
from trimtab_operator.finetunejob.model import resolve
from trimtab_operator.finetunejob.network import network_policy
from trimtab_operator.finetunejob.observe import Observation
from trimtab_operator.finetunejob.rollout import RolloutStep, roll_out, under_way
from trimtab_operator.finetunejob.spending import spending
from trimtab_operator.finetunejob.status import Because, Findings, build
from trimtab_operator.finetunejob.ttl import expires_in
from trimtab_operator.finetunejob.walk import Role, Situation, Walked, begin, removal, soonest, walk
from trimtab_trainer.config import CONTRACT_VERSION

_ENDED = (JobPhase.SUCCEEDED, JobPhase.FAILED)


@dataclass(frozen=True)
class Setting:
    """The arguments of a plan, parsed."""

    obj: Object
    job: FineTuneJob
    seen: Observation
    settings: Settings
    now: datetime


def plan(obj: Object, seen: Observation, settings: Settings, now: datetime) -> Plan:
    """The next actions and the whole status."""
    try:
        job = FineTuneJob.model_validate(obj)
    except ValidationError as error:
        return _unreadable(obj, error, now)
    setting = Setting(obj, job, seen, settings, now)
    if job.status.phase in _ENDED:
        return _after_end(setting)
    try:
        stages = effective(job.spec)
    except ValueError as error:
        return _refused(setting, Because(reasons.MISFIT.name, clean(f"defaults and stage, merged: {error}", 4096)))
    question = Question(obj["metadata"]["name"], job, stages, seen, settings)
    hold = verdict(question)
    accepted = job.status.images is not None
    if hold is not None and hold.final and not accepted:
        return _refused(setting, Because(hold.reason, hold.message))
    model = job.status.model
    if hold is None:
        resolved = resolve(job, seen.source)
        if isinstance(resolved, Verdict):
            hold = resolved
        else:
            model = resolved
    if hold is not None and not accepted:
        return _status_only(setting, _findings(setting, begin(job, model), JobPhase.PENDING, _because(hold), hold=hold))
    images = job.status.images or Images(trainer=settings.trainer_image, contract_version=CONTRACT_VERSION)
    may_start = hold is None and not job.spec.suspend
    walked = walk(Situation(obj, job, stages, seen, settings, now, images, model, may_start))
    return _after_walk(setting, walked, images, hold)


def _unreadable(obj: Object, error: ValidationError, now: datetime) -> Plan:
    """The schema let pass what the models refuse; what runs already goes on."""
    old = FineTuneJobStatus.model_validate(obj.get("status") or {})
    if old.phase in _ENDED:
        return Plan()
    because = Because(reasons.INVALID_SPEC.name, clean(complaint(error), 4096))
    found = Findings(
        generation=obj["metadata"].get("generation", 0),
        images=old.images,
        model=old.model,
        prepare=old.prepare,
        stages=tuple(old.stages),
        endpoint=old.endpoint,
        clock=deadlines.Clock(old.active_seconds, old.active_since),
        now=because,
        phase=old.phase if old.images else JobPhase.FAILED,
        moving=False,
        rejected=because,
    )
    status = build(old, found, now)
    return Plan(status=status, events=transitions(old, FineTuneJobStatus.model_validate(status)))


def _after_walk(setting: Setting, walked: Walked, images: Images, hold: Verdict | None) -> Plan:
    job, now = setting.job, setting.now
    left = deadlines.remaining(job.status, job.spec.active_deadline_seconds, now)
    failed = walked.failed
    if failed is None and left is not None and left <= 0 and not walked.done:
        told = f"the job has run for activeDeadlineSeconds ({job.spec.active_deadline_seconds} s)"
        failed = Because(reasons.DEADLINE.name, f"{told}; create a new job with more time")
    if failed is not None:
        return _status_only(setting, _findings(setting, walked, JobPhase.FAILED, failed, images=images, hold=hold))
    rollout = None
    if walked.done and job.spec.rollout is not None:
        artifact = next(s.artifact for s in walked.stages if s.name == job.spec.rollout.from_)
        if artifact is not None and _recorded(job, walked):
            rollout = roll_out(setting.obj, job, artifact, setting.seen.endpoint)
        else:
            rollout = under_way(job.spec.rollout.endpoint_name)
    phase, because, moving = _judge(setting, walked, rollout, hold)
    found = _findings(setting, walked, phase, because, images=images, hold=hold, moving=moving, rollout=rollout)
    status = build(job.status, found, now)
    actions = walked.actions if rollout is None else rollout.actions
    if not walked.done and setting.settings.network_policies:
        actions = (Apply(network_policy(setting.obj, setting.settings)), *actions)
    requeue = soonest((left, *(role.requeue for role in walked.roles)))
    if phase in _ENDED:
        actions, requeue = (), None
    return _plan(setting, status, requeue, actions)


def _judge(
    setting: Setting, walked: Walked, rollout: RolloutStep | None, hold: Verdict | None
) -> tuple[JobPhase, Because, bool]:
    """Phase, reason, and whether anything moves."""
    job, refusal = setting.job, setting.seen.refusal
    if rollout is not None and (rollout.done or rollout.failed):
        if rollout.failed:
            return JobPhase.FAILED, Because(rollout.reason.name, rollout.message), False
        return JobPhase.SUCCEEDED, Because(reasons.COMPLETED.name, rollout.message), False
    if walked.done and job.spec.rollout is None:
        return JobPhase.SUCCEEDED, Because(reasons.COMPLETED.name, "every stage has its result"), False
    phase = _phase(walked)
    if refusal is not None:
        target = f"{refusal.target.kind} {refusal.target.name}"
        return phase, Because(refusal.reason, clean(f"{target}: {refusal.message}", 4096)), False
    if rollout is not None:
        return phase, Because(rollout.reason.name, rollout.message), rollout.reason is reasons.ROLLING_OUT
    if job.spec.suspend:
        if _idle(setting):
            return JobPhase.SUSPENDED, Because(reasons.IS_SUSPENDED.name), False
        return phase, Because(reasons.SUSPENDING.name, "pods save a checkpoint and end"), True
    stuck = next((role for role in walked.roles if role.stuck is not None), None)
    if stuck is not None and stuck.stuck is not None and not any(role.active for role in walked.roles):
        return phase, Because(stuck.stuck.reason, f"{stuck.name}: {stuck.stuck.message}"), False
    busy = next((role for role in walked.roles if role.step.state is not State.IDLE), None)
    if busy is None and hold is not None:
        return phase, _because(hold), False
    return phase, _activity(walked, busy), True


def _phase(walked: Walked) -> JobPhase:
    if not walked.prepared:
        return JobPhase.PREPARING if walked.prepare else JobPhase.PENDING
    if walked.done or any(stage.phase is StagePhase.RUNNING for stage in walked.stages):
        return JobPhase.RUNNING
    return JobPhase.QUEUED


def _activity(walked: Walked, busy: Role | None) -> Because:
    if (
        busy is None
        or (busy.active and not walked.prepared)
        or (busy.step.state is State.STARTING and not walked.prepared)
    ):
        return Because(reasons.PREPARING.name)
    match busy.step.state:
        case State.BACKOFF:
            return Because(reasons.RETRYING.name, f"{busy.name}: {busy.step.message}")
        case State.STOPPING:
            return Because(reasons.STOPPING.name, f"{busy.name}: {busy.step.message}")
        case State.STARTING:
            return Because(reasons.STARTING.name, f"{busy.name}, attempt {busy.step.record.attempt}")
        case _:
            return Because(reasons.RUNNING.name, busy.name)


def _findings(
    setting: Setting,
    walked: Walked,
    phase: JobPhase,
    because: Because,
    *,
    images: Images | None = None,
    hold: Verdict | None = None,
    moving: bool = False,
    rollout: RolloutStep | None = None,
) -> Findings:
    job = setting.job
    terminal = phase in _ENDED
    active = not terminal and any(role.active for role in walked.roles)
    stages = walked.stages
    if phase is JobPhase.FAILED:
        running = (StagePhase.RUNNING, StagePhase.QUEUED, StagePhase.SUSPENDED)
        stages = tuple(s.model_copy(update={"phase": StagePhase.FAILED}) if s.phase in running else s for s in stages)
    return Findings(
        generation=setting.obj["metadata"].get("generation", 0),
        images=images,
        model=walked.model,
        prepare=walked.prepare,
        stages=stages,
        endpoint=(rollout and rollout.endpoint) or job.status.endpoint,
        clock=deadlines.tick(job.status, active, setting.now),
        now=because,
        phase=phase,
        moving=moving,
        rejected=_because(hold) if hold else None,
        prepared=images is not None and walked.prepared,
        suspend=job.spec.suspend,
        idle=_idle(setting),
        rolled_out=None if job.spec.rollout is None else rollout is not None and rollout.done,
        progress=setting.seen.progress,
    )


def _refused(setting: Setting, because: Because) -> Plan:
    """Failed before anything ran: the spec can't be carried out."""
    hold = Verdict(because.reason, because.message, final=True)
    found = _findings(setting, begin(setting.job, None), JobPhase.FAILED, because, hold=hold)
    return _status_only(setting, found)


def _status_only(setting: Setting, found: Findings) -> Plan:
    return _plan(setting, build(setting.job.status, found, setting.now), None)


def _plan(setting: Setting, status: Object, requeue: float | None, actions: tuple[Action, ...] = ()) -> Plan:
    old = setting.job.status
    new = FineTuneJobStatus.model_validate(status)
    spent = spending(setting.job, new, setting.seen, setting.now)
    return Plan(actions, status, transitions(old, new), spent, requeue)


def _after_end(setting: Setting) -> Plan:
    """A job that has ended stays so: what still runs is stopped, and its time to live counts."""
    obj, job, seen = setting.obj, setting.job, setting.seen
    namespace = obj["metadata"]["namespace"]
    actions: list[Action] = [
        removal(left, namespace)
        for left in seen.jobs
        if not left.finished and not left.deleting and not any(p.failed for p in seen.pods if p.owner_uid == left.uid)
    ]
    left = expires_in(job, setting.now)
    if left is not None and left <= 0:
        name, uid, version = (obj["metadata"][key] for key in ("name", "uid", "resourceVersion"))
        actions = [Delete(FINETUNEJOB, namespace, name, uid, version)]
    generation = obj["metadata"].get("generation", 0)
    status = None
    if job.status.observed_generation != generation:
        status = {**obj["status"], "observedGeneration": generation}
    return Plan(actions=tuple(actions), status=status, requeue_after=left if left is not None and left > 0 else None)


def _recorded(job: FineTuneJob, walked: Walked) -> bool:
    """The observed status has every result, so that the endpoint may be told of it."""
    return [stage.artifact for stage in job.status.stages] == [stage.artifact for stage in walked.stages]


def _idle(setting: Setting) -> bool:
    return not any(not pod.over for pod in setting.seen.pods) and not any(not j.finished for j in setting.seen.jobs)


def _because(verdict: Verdict) -> Because:
    return Because(verdict.reason, verdict.message)
