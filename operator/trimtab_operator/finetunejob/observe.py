"""Everything that the plan of a FineTuneJob depends on, read from the store into frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from trimtab_operator.api.base import parsed
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.modelendpoint import ModelEndpoint
from trimtab_operator.core.complaints import Complaint
from trimtab_operator.core.controller import Reader
from trimtab_operator.core.kube import CLAIM, CONFIGMAP, FINETUNEJOB, JOB, MODELENDPOINT, POD, Object, Ref, ref_of
from trimtab_operator.core.names import (
    COMPONENT_PREPARE,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_JOB,
    LABEL_STAGE,
    child_name,
    label_value,
)
from trimtab_operator.core.pods import PodView, pod_view
from trimtab_operator.core.podtemplate import claim_of
from trimtab_operator.core.refusals import Refusal
from trimtab_trainer.config import Progress

PREPARE = ""
"""The role of the prepare Job; a stage's role is its name."""


@dataclass(frozen=True)
class JobView:
    """One attempt's Job."""

    name: str
    uid: str
    version: str
    role: str
    attempt: int
    complete: bool = False
    failed: str | None = None
    """Reason of the Failed condition; None: not failed."""
    message: str = ""
    ended_at: str = ""
    """When Complete or Failed was set."""
    deleting: bool = False
    size: int = 1
    """Pods that must succeed."""
    succeeded: int = 0
    started: str = ""
    """When it began, or went on after a suspension; empty while the Job controller has not seen that it may."""
    suspended: bool = False
    """Kueue, or someone else, holds it: it has no pods, or loses them."""
    was_suspended: bool = False
    """It is suspended or has been."""
    failing: bool = False
    """The Job controller has counted a failure."""

    @property
    def finished(self) -> bool:
        """The Job controller is done with it."""
        return self.complete or self.failed is not None


@dataclass(frozen=True)
class ClaimView:
    """A PersistentVolumeClaim."""

    access_modes: tuple[str, ...]
    lost: bool = False


@dataclass(frozen=True)
class Observation:
    """What exists now."""

    jobs: tuple[JobView, ...] = ()
    pods: tuple[PodView, ...] = ()
    strangers: frozenset[str] = frozenset()
    """Uids of Jobs and pods that an earlier job of this name has left."""
    config_maps: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Name of each ConfigMap to the role and attempt that it belongs to."""
    claims: Mapping[str, ClaimView] = field(default_factory=dict)
    """Those of the spec's claims that exist."""
    endpoint: ModelEndpoint | None = None
    """What `rollout.endpointName` names."""
    source: FineTuneJob | None = None
    """The job that `model.uri` names by job://."""
    progress: Mapping[str, Progress] = field(default_factory=dict)
    """Stage to the newest answer of its running attempt."""
    complaints: Mapping[str, Complaint] = field(default_factory=dict)
    """Uid of a Job or pod that does not get on, to the newest Warning about it."""
    refusal: Refusal | None = None

    def jobs_of(self, role: str) -> tuple[JobView, ...]:
        """Jobs of prepare or of one stage."""
        return tuple(job for job in self.jobs if job.role == role)

    def highest_label(self, role: str) -> int:
        """The highest attempt number that a child of this role carries; 0 where there is none."""
        return max(
            [
                *(job.attempt for job in self.jobs_of(role)),
                *(attempt_of(pod.labels) for pod in self.pods_of(role)),
                *(attempt for owner, attempt in self.config_maps.values() if owner == role),
            ],
            default=0,
        )

    def pods_of(self, role: str) -> tuple[PodView, ...]:
        """Pods of prepare or of one stage, of any attempt."""
        return tuple(pod for pod in self.pods if role_of(pod.labels) == role)


def role_of(labels: Mapping[str, str]) -> str:
    """The role that a child's labels name."""
    return PREPARE if labels.get(LABEL_COMPONENT) == COMPONENT_PREPARE else labels.get(LABEL_STAGE, "?")


def attempt_name(name: str, uid: str, role: str, attempt: int) -> str:
    """Name of an attempt's Job and ConfigMap."""
    return child_name(name, uid, role or COMPONENT_PREPARE, str(attempt))


def claims_of(job: FineTuneJob) -> set[str]:
    """Claims that the spec names."""
    return {claim for uri in uris_of(job) if (claim := claim_of(uri)) is not None}


def uris_of(job: FineTuneJob) -> list[str]:
    """Every URI of the spec: artifacts, model, tokenizer, data."""
    spec = job.spec
    tokenizer = spec.model.tokenizer and spec.model.tokenizer.uri
    uris = [spec.artifacts.uri, *(uri for uri in (spec.model.uri, tokenizer) if uri)]
    for stage in spec.stages:
        uris += [source.uri for source in stage.sources]
    return uris


def source_of(uri: str | None) -> tuple[str, str] | None:
    """Job and stage of a `job://name/stage` URI; None for another."""
    if uri is None or not uri.startswith("job://"):
        return None
    parts = urlsplit(uri)
    return parts.netloc, parts.path.strip("/")


def foreign(job: FineTuneJob, namespace: str) -> list[Ref]:
    """What the job looks at that is not its child."""
    refs = [Ref(CLAIM.kind, namespace, claim) for claim in sorted(claims_of(job))]
    if source := source_of(job.spec.model.uri):
        refs.append(Ref(FINETUNEJOB.kind, namespace, source[0]))
    if job.spec.rollout:
        refs.append(Ref(MODELENDPOINT.kind, namespace, job.spec.rollout.endpoint_name))
    return refs


def observe(reader: Reader, obj: Object, job: FineTuneJob) -> Observation:
    """Read all of it; local memory only."""
    name, namespace, uid = (obj["metadata"][key] for key in ("name", "namespace", "uid"))
    rollout = job.spec.rollout
    endpoint = reader.get(MODELENDPOINT, namespace, rollout.endpoint_name) if rollout else None
    source = source_of(job.spec.model.uri)
    other = reader.get(FINETUNEJOB, namespace, source[0]) if source else None
    jobs = tuple(_job_view(child) for child in reader.owned(JOB, namespace, uid))
    pods = tuple(pod_view(pod) for pod in reader.labelled(POD, namespace, LABEL_JOB, label_value(name)))
    own = tuple(pod for pod in pods if _is_ours(pod, name, uid))
    named = {child["metadata"]["uid"] for child in reader.labelled(JOB, namespace, LABEL_JOB, label_value(name))}
    of_name = named | {pod.uid for pod in pods}
    return Observation(
        jobs=jobs,
        pods=own,
        strangers=frozenset(of_name - {job.uid for job in jobs} - {pod.uid for pod in own}),
        config_maps={
            child["metadata"]["name"]: (role_of(labels), attempt_of(labels))
            for child in reader.owned(CONFIGMAP, namespace, uid)
            if (labels := child["metadata"].get("labels") or {}) is not None
        },
        claims={
            claim: _claim_view(found)
            for claim in sorted(claims_of(job))
            if (found := reader.get(CLAIM, namespace, claim)) is not None
        },
        endpoint=parsed(ModelEndpoint, endpoint),
        source=parsed(FineTuneJob, other),
        refusal=reader.refusal(ref_of(obj)),
    )


def _is_ours(pod: PodView, name: str, uid: str) -> bool:
    """An earlier job of the same name had other Jobs; its last pods may still be ending."""
    return pod.owner_name == attempt_name(name, uid, role_of(pod.labels), attempt_of(pod.labels))


def attempt_of(labels: Mapping[str, str]) -> int:
    """The attempt that a child's labels name; 0 where they name none."""
    value = labels.get(LABEL_ATTEMPT, "0")
    return int(value) if value.isdecimal() else 0


def _job_view(job: Object) -> JobView:
    metadata = job["metadata"]
    labels = metadata.get("labels") or {}
    spec, status = job["spec"], job.get("status", {})
    conditions = status.get("conditions") or []
    held = {c["type"]: c for c in conditions if c.get("status") == "True"}
    suspension = next((c for c in conditions if c["type"] == "Suspended"), None)
    end = held.get("Complete") or held.get("Failed") or {}
    return JobView(
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata["resourceVersion"],
        role=role_of(labels),
        attempt=attempt_of(labels),
        complete="Complete" in held,
        failed=held["Failed"].get("reason", "Failed") if "Failed" in held else None,
        message=end.get("message", ""),
        ended_at=end.get("lastTransitionTime", ""),
        deleting="deletionTimestamp" in metadata,
        size=spec.get("completions") or 1,
        succeeded=status.get("succeeded") or 0,
        started=_started(metadata, status, suspension),
        suspended=bool(spec.get("suspend")),
        was_suspended=bool(spec.get("suspend")) or suspension is not None,
        failing="Failed" in held or "FailureTarget" in held,
    )


def _started(metadata: Object, status: Object, suspension: Object | None) -> str:
    """A resumed Job shows its former start until the Job controller has looked at it."""
    if suspension is None:
        return str(status.get("startTime") or metadata.get("creationTimestamp", ""))
    return "" if suspension["status"] == "True" else str(suspension.get("lastTransitionTime", ""))


def _claim_view(claim: Object) -> ClaimView:
    return ClaimView(
        access_modes=tuple(claim.get("spec", {}).get("accessModes") or ()),
        lost=claim.get("status", {}).get("phase") == "Lost",
    )
