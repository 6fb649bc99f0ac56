"""The controller of FineTuneJobs: a thin adapter between the one loop and the pure parts."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from trimtab_operator.api.base import parsed
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.core.actions import Plan
from trimtab_operator.core.complaints import ComplaintBoard, Subject
from trimtab_operator.core.controller import Reader
from trimtab_operator.core.interests import Interests
from trimtab_operator.core.kube import FINETUNEJOB, POD, Object, Ref, ref_of
from trimtab_operator.core.names import LABEL_JOB
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob.board import ProgressBoard, Target
from trimtab_operator.finetunejob.observe import Observation, foreign, observe, role_of
from trimtab_operator.finetunejob.plan import plan


class FineTuneJobController:
    """Reconciles FineTuneJobs. The boards are shared with those who ask: pods for progress, the API for complaints."""

    kind = FINETUNEJOB

    def __init__(self, board: ProgressBoard | None = None, complaints: ComplaintBoard | None = None) -> None:
        self.board = board or ProgressBoard()
        self.complaints = complaints or ComplaintBoard()
        self._interests = Interests()

    def observe(self, reader: Reader, obj: Object) -> Observation:
        """Read the store, and note what this job waits for and whom to ask for its progress."""
        owner = ref_of(obj)
        job = parsed(FineTuneJob, obj)
        if job is None:  # the plan says what is wrong
            return Observation()
        self._interests.note(owner, () if job.status.completion_time else foreign(job, owner.namespace))
        seen = observe(reader, obj, job)
        self.board.watch(owner, targets(job, seen))
        self.complaints.watch(owner, subjects(job, seen, owner.namespace))
        progress = {target.stage: answer for target, answer in self.board.answers(owner).items()}
        complaints = {subject.uid: said for subject, said in self.complaints.answers(owner).items() if said}
        return replace(seen, progress=progress, complaints=complaints)

    def plan(self, obj: Object, observation: Observation, settings: Settings, now: datetime) -> Plan:
        """The next actions and the whole status."""
        return plan(obj, observation, settings, now)

    def interested(self, obj: Object) -> list[Ref]:
        """Jobs that look at this claim, endpoint or other job; and the one whose pod this is, by its label.

        A pod may outlive its Job, through which it would be traced to us: the next attempt waits for its end.
        """
        found = self._interests.of(ref_of(obj))
        name = (obj["metadata"].get("labels") or {}).get(LABEL_JOB)
        if obj["kind"] == POD.kind and name:
            found.append(Ref(FINETUNEJOB.kind, obj["metadata"]["namespace"], name))
        return found


def targets(job: FineTuneJob, seen: Observation) -> list[Target]:
    """The running first pod of each stage's recorded attempt."""
    uids = {stage.job_uid for stage in job.status.stages if stage.job_uid}
    return [
        Target(pod.name, role_of(pod.labels), pod.ip)
        for pod in seen.pods
        if pod.owner_uid in uids and pod.index == 0 and pod.phase == "Running" and pod.ip and not pod.deleting
    ]


def subjects(job: FineTuneJob, seen: Observation, namespace: str) -> list[Subject]:
    """Running attempts' Jobs that lack pods, and pods that have a node and do not start."""
    if job.status.completion_time:
        return []
    current = [known for known in seen.jobs if not known.finished and not known.suspended and not known.deleting]
    found = []
    for each in current:
        pods = [pod for pod in seen.pods if pod.owner_uid == each.uid]
        if len(pods) + each.succeeded < each.size:
            found.append(each.uid)
        found += [pod.uid for pod in pods if pod.phase == "Pending" and pod.node is not None and not pod.deleting][:1]
    return [Subject(namespace, uid) for uid in found]
