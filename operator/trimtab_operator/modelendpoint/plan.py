"""What to do next for a ModelEndpoint. Pure: the same arguments give the same plan.

A new digest gets a Deployment of its own beside the one that serves. When all its replicas are ready, the Service
selects it, and the old Deployment goes.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import ValidationError

from trimtab_operator.api import modelendpoint_reasons as reasons
from trimtab_operator.api.base import complaint
from trimtab_operator.api.modelendpoint import EndpointPhase, ModelEndpoint, ModelEndpointStatus, Revision
from trimtab_operator.core.actions import Action, Apply, Create, Delete, EventNote, EventType, Plan
from trimtab_operator.core.kube import CONFIGMAP, DEPLOYMENT, Object
from trimtab_operator.core.reports import clean
from trimtab_operator.core.settings import Settings
from trimtab_operator.modelendpoint import manifests
from trimtab_operator.modelendpoint.observe import Observation
from trimtab_operator.modelendpoint.problems import problem
from trimtab_operator.modelendpoint.status import Findings, build, unreadable
from trimtab_operator.modelendpoint.target import Waiting, target


def plan(obj: Object, seen: Observation, settings: Settings, now: datetime) -> Plan:
    """The next actions and the whole status."""
    try:
        endpoint = ModelEndpoint.model_validate(obj)
    except ValidationError as error:
        return Plan(status=unreadable(obj, clean(complaint(error), 4096), now))
    stable = endpoint.status.stable
    wanted = target(endpoint, seen.source)
    following = None if isinstance(wanted, Waiting) or _same(wanted, stable) else wanted
    if following is not None and _proven(obj, endpoint, following, seen):
        stable, following = following, None
    elif not isinstance(wanted, Waiting) and stable is not None and _same(wanted, stable):
        stable = wanted
    pinned = [r for r in (stable, following) if r is not None and _is_pinned(endpoint, r)]
    actions: list[Action] = []
    for revision in pinned:
        actions += [
            Create(manifests.config_map(obj, endpoint, revision)),
            Apply(manifests.deployment(obj, endpoint, revision, settings)),
        ]
    first = stable or following
    if first is not None:
        actions.append(Apply(manifests.service(obj, first)))
    if stable is not None and following is None and _at_rest(obj, endpoint, stable, seen):
        actions += _leftovers(obj, endpoint, stable, seen)
    found = Findings(
        stable=stable,
        next=following,
        waiting=wanted if isinstance(wanted, Waiting) else None,
        deployments=seen.deployments,
        problem=next(
            (
                found
                for each in (following, stable)
                if each
                and (found := problem(seen.pods, seen.deployments.get(each.revision), each.revision)) is not None
            ),
            None,
        ),
        refusal=seen.refusal,
        url=manifests.url(obj, seen.cluster_ip, settings),
        selector=",".join(f"{k}={v}" for k, v in manifests.selector(obj, first.revision).items()) if first else "",
        generation=obj["metadata"].get("generation", 0),
    )
    status = build(endpoint, found, now)
    new = ModelEndpointStatus.model_validate(status)
    return Plan(actions=tuple(actions), status=status, events=_transitions(endpoint.status, new))


def _same(wanted: Revision, stable: Revision | None) -> bool:
    """The same bytes; where they lie may change, and the Deployment follows."""
    return stable is not None and wanted.digest == stable.digest


def _is_pinned(endpoint: ModelEndpoint, revision: Revision) -> bool:
    """The observed status names this revision, so its Deployment may exist."""
    return any(_same(revision, known) for known in (endpoint.status.stable, endpoint.status.next))


def _proven(obj: Object, endpoint: ModelEndpoint, revision: Revision, seen: Observation) -> bool:
    """All replicas of a revision have answered a completion."""
    return endpoint.spec.replicas > 0 and _is_pinned(endpoint, revision) and _is_complete(obj, endpoint, revision, seen)


def _at_rest(obj: Object, endpoint: ModelEndpoint, stable: Revision, seen: Observation) -> bool:
    """The status and the Service name the served revision, and its Deployment is complete."""
    named = _same(stable, endpoint.status.stable) and seen.selected == stable.revision
    return named and _is_complete(obj, endpoint, stable, seen)


def _is_complete(obj: Object, endpoint: ModelEndpoint, revision: Revision, seen: Observation) -> bool:
    """All pods of a revision run with what the spec says now, and are ready."""
    view = seen.deployments.get(revision.revision)
    config = manifests.config_map(obj, endpoint, revision)["metadata"]["name"]
    return view is not None and view.rolled_out and not view.deleting and view.config_map == config


def _leftovers(obj: Object, endpoint: ModelEndpoint, stable: Revision, seen: Observation) -> list[Action]:
    """Deployments of other revisions, and ConfigMaps that no pod reads any more."""
    namespace = obj["metadata"]["namespace"]
    old = [view for view in seen.deployments.values() if view.revision != stable.revision and not view.deleting]
    actions: list[Action] = [Delete(DEPLOYMENT, namespace, view.name, view.uid, view.version) for view in old]
    if len(seen.deployments) == 1:
        kept = manifests.config_map(obj, endpoint, stable)["metadata"]["name"]
        unused = [(name, *known) for name, known in seen.config_maps.items() if name != kept]
        actions += [Delete(CONFIGMAP, namespace, *each) for each in unused]
    return actions


def _transitions(old: ModelEndpointStatus, new: ModelEndpointStatus) -> tuple[EventNote, ...]:
    notes = []
    if new.stable is not None and (old.stable is None or old.stable.digest != new.stable.digest):
        told = f"revision {new.stable.revision}: {new.stable.uri} {new.stable.digest}"
        notes.append(EventNote(EventType.NORMAL, reasons.SERVING.name, told, "Serve"))
    if new.phase is EndpointPhase.DEGRADED and (old.phase is not new.phase or old.reason != new.reason):
        message = next((c.message for c in new.conditions if c.type == reasons.DEGRADED), "")
        notes.append(EventNote(EventType.WARNING, new.reason, message, "Serve"))
    return tuple(notes)
