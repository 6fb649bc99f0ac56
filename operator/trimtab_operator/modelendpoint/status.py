"""The whole status of a ModelEndpoint, from what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from trimtab_operator.api import modelendpoint_reasons as reasons
from trimtab_operator.api.modelendpoint import (
    EndpointPhase,
    HistoryEntry,
    ModelEndpoint,
    ModelEndpointStatus,
    Revision,
)
from trimtab_operator.core.conditions import set_condition
from trimtab_operator.core.kube import Object
from trimtab_operator.core.plainjson import compact
from trimtab_operator.core.podproblems import Stuck
from trimtab_operator.core.refusals import Refusal
from trimtab_operator.core.reports import clean
from trimtab_operator.modelendpoint.observe import DeploymentView
from trimtab_operator.modelendpoint.target import Waiting

_HISTORY = 10
Said = tuple[bool, str, str]
"""A condition's status, reason and message."""


@dataclass(frozen=True)
class Findings:
    """Everything that the status says."""

    stable: Revision | None
    next: Revision | None
    waiting: Waiting | None
    deployments: Mapping[str, DeploymentView]
    problem: Stuck | None
    refusal: Refusal | None
    url: str | None
    selector: str
    generation: int


def build(endpoint: ModelEndpoint, found: Findings, now: datetime) -> Object:
    """The status as the API server is to hold it."""
    old = endpoint.status
    stable, following = _counted(found.stable, found), _counted(found.next, found)
    shown = stable or following
    view = found.deployments.get(shown.revision) if shown else None
    verdicts = {
        reasons.READY: _ready(endpoint, stable),
        reasons.PROGRESSING: _progressing(endpoint, found, stable),
        reasons.DEGRADED: _degraded(found),
    }
    phase = _phase(verdicts)
    cause = verdicts[_DECIDES[phase]]
    status = ModelEndpointStatus(
        observed_generation=found.generation,
        phase=phase,
        reason=cause[1],
        url=found.url or old.url,
        replicas=view.replicas if view else 0,
        selector=found.selector,
        stable=stable,
        next=following,
        history=history(endpoint, stable),
    )
    conditions = [c.model_dump(mode="json", by_alias=True, exclude_none=True) for c in old.conditions]
    for kind, (value, reason, message) in verdicts.items():
        conditions = set_condition(conditions, kind, value, reason, message, found.generation, now)
    body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {**compact(body), "conditions": conditions}


def unreadable(obj: Object, message: str, now: datetime) -> Object:
    """The status of a spec that the schema let pass and the models refuse; what is served goes on."""
    old: Object = obj.get("status") or {}
    generation = obj["metadata"].get("generation", 0)
    conditions = set_condition(
        old.get("conditions", []), reasons.PROGRESSING, False, reasons.INVALID_SPEC.name, message, generation, now
    )
    return {**old, "observedGeneration": generation, "reason": reasons.INVALID_SPEC.name, "conditions": conditions}


def history(endpoint: ModelEndpoint, stable: Revision | None) -> list[HistoryEntry]:
    """Served models, newest first; what is served now stands first."""
    known = endpoint.status.history
    if stable is None:
        return known
    model = endpoint.spec.model
    asked = model.source.job_uid if model.source and model.digest == stable.digest else None
    if known and known[0].digest == stable.digest and (asked is None or known[0].job_uid == asked):
        return known
    return [HistoryEntry(digest=stable.digest, job_uid=asked), *known][:_HISTORY]


_DECIDES = {
    EndpointPhase.HEALTHY: reasons.READY,
    EndpointPhase.PROGRESSING: reasons.PROGRESSING,
    EndpointPhase.DEGRADED: reasons.DEGRADED,
}


def _phase(verdicts: Mapping[str, Said]) -> EndpointPhase:
    if verdicts[reasons.DEGRADED][0]:
        return EndpointPhase.DEGRADED
    at_rest = verdicts[reasons.PROGRESSING][1] == reasons.AT_REST.name
    return EndpointPhase.HEALTHY if verdicts[reasons.READY][0] and at_rest else EndpointPhase.PROGRESSING


def _counted(revision: Revision | None, found: Findings) -> Revision | None:
    if revision is None:
        return None
    view = found.deployments.get(revision.revision)
    return revision.model_copy(update={"ready": view.ready if view else 0})


def _ready(endpoint: ModelEndpoint, stable: Revision | None) -> Said:
    if stable is not None and stable.ready > 0:
        return True, reasons.SERVING.name, ""
    if endpoint.spec.replicas == 0:
        return False, reasons.SCALED_TO_ZERO.name, "spec.replicas is 0"
    if stable is None:
        return False, reasons.NO_MODEL.name, ""
    return False, reasons.NO_READY_POD.name, f"no pod of revision {stable.revision} is ready"


def _progressing(endpoint: ModelEndpoint, found: Findings, stable: Revision | None) -> Said:
    if found.refusal is not None:
        target = f"{found.refusal.target.kind} {found.refusal.target.name}"
        return False, found.refusal.reason, clean(f"{target}: {found.refusal.message}", 4096)
    if found.waiting is not None:
        return True, found.waiting.reason.name, found.waiting.message
    if endpoint.spec.replicas == 0:
        return False, reasons.SCALED_TO_ZERO.name, "spec.replicas is 0; a model is proven only by a pod that answers"
    starting = found.next or stable
    view = found.deployments.get(starting.revision) if starting else None
    if starting is not None and (found.next is not None or view is None or not view.rolled_out):
        return True, reasons.STARTING.name, f"revision {starting.revision}"
    return False, reasons.AT_REST.name, ""


def _degraded(found: Findings) -> Said:
    if found.problem is not None:
        return True, found.problem.reason, found.problem.message
    return False, reasons.HEALTHY.name, ""
