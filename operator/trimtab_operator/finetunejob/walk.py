"""The walk along a job's work: prepare once, then each stage as soon as the one that it starts from is done. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.status import ArtifactStatus, Images, PrepareStatus, StagePhase, StageStatus
from trimtab_operator.core.actions import Action, Apply, Confirm, Create, Delete
from trimtab_operator.core.kube import JOB, POD, SERVICE, Object, kind_of
from trimtab_operator.core.podproblems import Stuck
from trimtab_operator.core.reports import clean
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob import manifests
from trimtab_operator.finetunejob.attempts import Record, State, Step, advance
from trimtab_operator.finetunejob.merge import Effective
from trimtab_operator.finetunejob.observe import PREPARE, JobView, Observation
from trimtab_operator.finetunejob.reports import Problem, prepare_report, train_report
from trimtab_operator.finetunejob.stages import after_prepare, after_step, after_success, with_progress
from trimtab_operator.finetunejob.status import Because
from trimtab_operator.finetunejob.stuck import Start, starting


@dataclass(frozen=True)
class Situation:
    """What the walk needs to know."""

    obj: Object
    job: FineTuneJob
    stages: tuple[Effective, ...]
    seen: Observation
    settings: Settings
    now: datetime
    images: Images
    model: ArtifactStatus | None
    """What `model.uri` was resolved to."""
    may_start: bool
    """New attempts are allowed."""


@dataclass(frozen=True)
class Role:
    """Prepare or a stage, with its step."""

    name: str
    """As a person reads it."""
    step: Step
    stuck: Stuck | None = None
    requeue: float | None = None
    overdue: bool = False
    """Its pods have had their time to start."""

    @property
    def active(self) -> bool:
        """Pods of a recorded attempt run."""
        return self.step.state is State.RUNNING and self.step.record.job_uid is not None and self.stuck is None


@dataclass(frozen=True)
class Walked:
    """Where the walk led."""

    stages: tuple[StageStatus, ...]
    model: ArtifactStatus | None
    prepare: PrepareStatus | None
    roles: tuple[Role, ...] = ()
    """Those that are at work, in order."""
    actions: tuple[Action, ...] = ()
    failed: Because | None = None

    @property
    def prepared(self) -> bool:
        """Every stage's data are ready."""
        return all(stage.prepared for stage in self.stages)

    @property
    def done(self) -> bool:
        """Every stage has its result."""
        return all(stage.phase is StagePhase.SUCCEEDED for stage in self.stages)


def begin(job: FineTuneJob, model: ArtifactStatus | None) -> Walked:
    """What the status says, with an entry for each stage."""
    known = {stage.name: stage for stage in job.status.stages}
    stages = tuple(known.get(stage.name) or StageStatus(name=stage.name) for stage in job.spec.stages)
    return Walked(stages, model, job.status.prepare)


def walk(situation: Situation) -> Walked:
    """Prepare, then the stages; each step sees what the one before it found out."""
    walked = begin(situation.job, situation.model)
    if not walked.prepared:
        walked = _prepare(situation, walked)
    for index, stage in enumerate(situation.stages):
        if walked.failed is None and walked.prepared and walked.stages[index].phase is not StagePhase.SUCCEEDED:
            walked = _train(situation, walked, index, stage)
    return walked


def _prepare(situation: Situation, walked: Walked) -> Walked:
    role = _role(situation, PREPARE, "prepare", Record.of(walked.prepare), situation.stages[0].retries)
    record = role.step.record
    prepare = PrepareStatus(
        attempt=record.attempt, job_uid=record.job_uid, failures=record.failures if record.failures.count else None
    )
    walked = replace(walked, prepare=prepare if record.attempt else None)
    if role.step.state is State.FAILED:
        return replace(walked, failed=_failed(role))
    if role.step.state is State.SUCCEEDED:
        found = _with_report(situation, walked, role.step)
        return replace(walked, failed=_problem(role, found)) if isinstance(found, Problem) else found
    if role.overdue:
        return replace(walked, failed=_overdue(situation, role))
    return _join(
        situation,
        walked,
        role,
        PREPARE,
        lambda: manifests.prepare_objects(
            situation.obj, situation.job, situation.stages, record.attempt, situation.images, situation.settings
        ),
    )


def _with_report(situation: Situation, walked: Walked, step: Step) -> Walked | Problem:
    report = prepare_report(_last_words(step), len(situation.stages))
    if isinstance(report, Problem):
        return report
    stages = after_prepare(walked.stages, report)
    if isinstance(stages, Problem):
        return stages
    model = walked.model
    if report.model is not None and model is None:
        model = ArtifactStatus(uri=report.model.uri, digest=report.model.digest)
    if model is None and situation.job.spec.model.uri is not None:
        return Problem(
            reasons.REPORT_INVALID.name, "the prepare report names no model, but model.uri does; check the image"
        )
    return replace(walked, stages=stages, model=model)


def _train(situation: Situation, walked: Walked, index: int, stage: Effective) -> Walked:
    status = walked.stages[index]
    source = next((s.artifact for s in walked.stages if s.name == stage.stage.from_), None)
    model = source if stage.stage.from_ else walked.model
    results = {each.name: each.artifact for each in walked.stages if each.artifact is not None}
    judges = stage.stage.ppo.reward_stages if stage.stage.ppo else []
    if (stage.stage.from_ and model is None) or not results.keys() >= set(judges):
        return walked
    role = _role(situation, stage.name, f"stage {stage.name}", Record.of(status), stage.retries)
    step = role.step
    if step.state is State.SUCCEEDED:
        folder = manifests.stage_folder(situation.obj, situation.job, stage.name)
        report = train_report(_last_words(step))
        ended = report if isinstance(report, Problem) else after_success(status, report, folder, situation.now)
        if not isinstance(ended, Problem):
            return _put(walked, index, ended)
        step = replace(step, state=State.FAILED, message=ended.message)
        failed = replace(walked, failed=_problem(role, ended))
        return _put(failed, index, after_step(status, step, None, False, situation.now))
    status = after_step(status, step, role.stuck, situation.job.spec.suspend, situation.now)
    if step.state is State.RUNNING:
        status = with_progress(status, situation.seen.progress.get(stage.name))
    walked = _put(walked, index, status)
    if step.state is State.FAILED:
        return replace(walked, failed=_failed(role))
    if role.overdue:
        return replace(walked, failed=_overdue(situation, role))
    return _join(
        situation,
        walked,
        role,
        stage.name,
        lambda: manifests.train_objects(
            situation.obj, situation.job, stage, status, model, results, situation.images, situation.settings
        ),
    )


def _role(situation: Situation, role: str, name: str, record: Record, retries: int) -> Role:
    """One role's step, and whether its pods have started."""
    seen, now = situation.seen, situation.now
    jobs, pods = seen.jobs_of(role), seen.pods_of(role)
    step = advance(
        record,
        jobs,
        pods,
        highest_label=seen.highest_label(role),
        retries=retries,
        may_start=situation.may_start,
        stop=situation.job.spec.suspend,
        now=now,
    )
    start = Start()
    current = next((job for job in jobs if job.uid == step.record.job_uid), None)
    if step.state is State.RUNNING and current is not None:
        spec = situation.job.spec
        start = starting(
            current,
            [pod for pod in pods if pod.owner_uid == current.uid],
            seen.complaints,
            now,
            queue=spec.queue_name if role != PREPARE else None,
            deadline=spec.starting_deadline_seconds,
        )
    return Role(name, step, start.stuck, soonest((step.requeue, start.requeue)), start.overdue)


def _join(situation: Situation, walked: Walked, role: Role, label: str, objects: Callable[[], list[Object]]) -> Walked:
    """The walk with a role at work and its actions. `label`: the role as children name it."""
    namespace = situation.obj["metadata"]["namespace"]
    actions: list[Action] = [removal(job, namespace) for job in role.step.delete]
    if role.step.confirm:
        # A watch may be behind, or have lost something: two attempts would run.
        labels = manifests.role_labels(situation.obj, label)
        actions += [Confirm(kind, namespace, labels, situation.seen.strangers) for kind in (JOB, POD)]
    if role.step.create:
        actions += [Apply(obj) if kind_of(obj) == SERVICE else Create(obj) for obj in objects()]
    return replace(walked, roles=(*walked.roles, role), actions=(*walked.actions, *actions))


def removal(job: JobView, namespace: str) -> Delete:
    """Delete a Job and its pods."""
    return Delete(JOB, namespace, job.name, job.uid, job.version)


def soonest(times: Iterable[float | None]) -> float | None:
    """The smallest of the times that are given; None where none is."""
    return min((time for time in times if time is not None), default=None)


def _put(walked: Walked, index: int, stage: StageStatus) -> Walked:
    return replace(walked, stages=(*walked.stages[:index], stage, *walked.stages[index + 1 :]))


def _last_words(step: Step) -> str:
    return step.lead.ended.message if step.lead and step.lead.ended else ""


def _failed(role: Role) -> Because:
    """The cause of the last failure, with the place."""
    last = role.step.record.failures.last
    reason = last.reason if last else "Error"
    return Because(reason, f"{role.name}, attempt {role.step.record.attempt}: {role.step.message}")


def _overdue(situation: Situation, role: Role) -> Because:
    told = f"its pods have not all started within {situation.job.spec.starting_deadline_seconds} s"
    cause = f": {role.stuck.message}" if role.stuck else ""
    place = f"{role.name}, attempt {role.step.record.attempt}"
    return Because(reasons.STARTING_DEADLINE.name, clean(f"{place}: {told}{cause}", 4096))


def _problem(role: Role, problem: Problem) -> Because:
    return Because(problem.reason, f"{role.name}, attempt {role.step.record.attempt}: {problem.message}")
