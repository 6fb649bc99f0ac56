"""The one loop: observe, plan, act, write the status. The only place that both reads and writes the cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import structlog

from trimtab_operator.core.actions import Action, Apply, Create, Plan, Spent
from trimtab_operator.core.apply import (
    NAME_TAKEN,
    NameTaken,
    StaleView,
    carry_out,
    check_owner,
    irreversible,
    refresh,
    target_of,
)
from trimtab_operator.core.controller import Controller
from trimtab_operator.core.errors import AlreadyExists, Conflict, Forbidden, Invalid, KubeError, NotFound
from trimtab_operator.core.events import EventRecorder
from trimtab_operator.core.kube import Change, Kube, Object, Ref, Sink, ref_of
from trimtab_operator.core.names import LABEL_ATTEMPT, LABEL_JOB, LABEL_STAGE, MANAGER_STATUS
from trimtab_operator.core.refusals import Refusal
from trimtab_operator.core.settings import Settings
from trimtab_operator.core.store import Store

log = structlog.stdlib.get_logger(__name__)

AnyController = Controller[Any]


class Result(StrEnum):
    """How a reconciliation ended; the `outcome` of the metric."""

    GONE = "gone"
    """There is no such object, or it is being deleted: its children go with it."""
    UNCHANGED = "unchanged"
    """What is desired is live."""
    WRITTEN = "written"
    STALE = "stale"
    """The plan was made of something that has changed: again, soon."""
    REFUSED = "refused"
    """The API server said no, and the status says so: again, later."""
    UNAVAILABLE = "unavailable"
    """The API server did not answer: again, later."""
    ERROR = "error"
    """A fault of ours: again, later."""


@dataclass(frozen=True)
class Outcome:
    """The result, and when to come back."""

    result: Result
    requeue_after: float | None = None
    """Seconds until the clock alone may change the plan."""
    retry_after: float | None = None
    """Seconds that the API server asked to wait."""
    reason: str = ""
    """Why it did not go well, in one word."""


@dataclass(frozen=True)
class Environment:
    """What the loop works with."""

    kube: Kube
    store: Store
    settings: Settings
    now: Callable[[], datetime]
    deliver: Sink
    """Takes each object that a write returned, and wakes whom it concerns."""
    events: EventRecorder
    spend: Callable[[str, Spent], None] = lambda namespace, spent: None
    """Counts what an attempt of a namespace has cost."""


async def reconcile(controller: AnyController, ref: Ref, env: Environment) -> Outcome:
    """Bring the cluster one plan closer to what one owner asks for. Raises nothing but faults of ours."""
    owner = env.store.find(ref)
    if owner is None or "deletionTimestamp" in owner["metadata"]:
        env.store.refusals.clear(ref)
        return Outcome(Result.GONE)
    try:
        return await _reconcile(controller, ref, owner, env)
    except StaleView as error:
        log.debug("planned for a stale view", reason=str(error))
        return Outcome(Result.STALE, reason=error.reason)
    except KubeError as error:
        log.warning("the API server is unavailable", reason=str(error))
        return Outcome(Result.UNAVAILABLE, retry_after=error.retry_after, reason=error.reason)


async def _reconcile(controller: AnyController, ref: Ref, owner: Object, env: Environment) -> Outcome:
    plan = _plan(controller, owner, env)
    written, refusal = await _act(plan, owner, env)
    if refusal is not None:
        env.store.refusals.record(ref, refusal)
        plan = _plan(controller, owner, env)
    elif env.store.refusal(ref) is not None:
        env.store.refusals.clear(ref)
        return Outcome(Result.WRITTEN, requeue_after=0.0)  # the status still tells of the refusal
    try:
        written |= await _write_status(plan, owner, env)
    except (Invalid, Forbidden) as error:
        # Nowhere to say it but here.
        log.error("status refused", reason=error.reason, message=error.message)
        return Outcome(Result.REFUSED, reason=error.reason)
    if refusal is not None:
        return Outcome(Result.REFUSED, requeue_after=plan.requeue_after, reason=refusal.reason)
    return Outcome(Result.WRITTEN if written else Result.UNCHANGED, requeue_after=plan.requeue_after)


def _plan(controller: AnyController, owner: Object, env: Environment) -> Plan:
    observation = controller.observe(env.store, owner)
    return controller.plan(owner, observation, env.settings, env.now())


async def _act(plan: Plan, owner: Object, env: Environment) -> tuple[bool, Refusal | None]:
    """Carry out the actions in order, up to the first refusal; whether something was written, and the refusal."""
    written = checked = False
    known = env.store.refusal(ref_of(owner))
    for action in plan.actions:
        with structlog.contextvars.bound_contextvars(**_log_context(action, env.store)):
            if irreversible(action) and not checked:
                await check_owner(env.kube, env.deliver, owner)
                checked = True
            try:
                done = await carry_out(action, env.kube, env.store, env.deliver)
            except NameTaken as error:
                return written, _told(Refusal(error.target, NAME_TAKEN, str(error)), known)
            except (Invalid, Forbidden) as error:
                return written, _told(Refusal(target_of(action), error.reason, error.message), known)
            except (Conflict, NotFound, AlreadyExists) as error:
                raise await _current(target_of(action), error, env) from error
            if done:
                log.info("carried out", action=type(action).__name__, target=str(target_of(action)))
            written |= done
    for note in plan.notes if written else ():
        log.info(note)
    return written, None


def _told(refusal: Refusal, known: Refusal | None) -> Refusal:
    """Log a refusal that is news."""
    if refusal != known:
        log.warning("refused", target=str(refusal.target), reason=refusal.reason, message=refusal.message)
    return refusal


def _log_context(action: Action, store: Store) -> dict[str, str]:
    """Job, stage and attempt that an action is about."""
    obj = action.obj if isinstance(action, Create | Apply) else store.find(target_of(action))
    labels = obj["metadata"].get("labels", {}) if obj is not None else {}
    named = {"job": LABEL_JOB, "stage": LABEL_STAGE, "attempt": LABEL_ATTEMPT}
    return {word: labels[label] for word, label in named.items() if label in labels}


async def _write_status(plan: Plan, owner: Object, env: Environment) -> bool:
    """Write the whole status if it differs, against the version that the plan was made for; then its events."""
    if plan.status is None or plan.status == owner.get("status", {}):
        return False
    metadata = {key: owner["metadata"][key] for key in ("name", "namespace", "resourceVersion")}
    body = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "metadata": metadata, "status": plan.status}
    try:
        written = await env.kube.apply_status(body, manager=MANAGER_STATUS)
    except (Conflict, NotFound) as error:
        raise await _current(ref_of(owner), error, env) from error
    env.deliver(Change.UPSERT, written)
    env.events.emit(owner, plan.events)
    for spent in plan.spent:
        env.spend(owner["metadata"]["namespace"], spent)
    return True


async def _current(ref: Ref, error: KubeError, env: Environment) -> StaleView:
    """The store is behind where a write met something else: put in what is live, so that the next plan sees it."""
    await refresh(ref, env.store.find(ref), env.kube, env.deliver)
    return StaleView(str(error), error.reason)
