"""Carry out actions: write what differs from what is live, adopt nothing, refuse to act on a stale view."""

from __future__ import annotations

import hashlib
import json

from trimtab_operator.core.actions import Action, Apply, Confirm, Create, Delete
from trimtab_operator.core.contains import contains
from trimtab_operator.core.errors import AlreadyExists
from trimtab_operator.core.kube import JOB, KINDS, Change, Kube, Object, Ref, Sink, kind_of, ref_of
from trimtab_operator.core.names import ANNOTATION_HASH
from trimtab_operator.core.store import Store, controller_of, deleted_after, uid_of, version_of

NAME_TAKEN = "NameTaken"


class NameTaken(Exception):
    """An object of that name is there and belongs to someone else."""

    def __init__(self, live: Object) -> None:
        self.live = live
        self.target = ref_of(live)
        super().__init__(
            f"{self.target.kind} {self.target.name} exists in namespace {self.target.namespace} and belongs to "
            f"{_owner_text(live)}; delete or rename it"
        )


class StaleView(Exception):
    """The plan was made for what has changed since; what is live now is in the store."""

    def __init__(self, message: str, reason: str = "OwnerChanged") -> None:
        self.reason = reason
        super().__init__(message)


async def check_owner(kube: Kube, deliver: Sink, owner: Object) -> None:
    """Before an irreversible step: the live owner is the very version that the plan was made for.

    Raises:
        StaleView: It is not; the live one has been delivered.
        KubeError: The API server did not answer.
    """
    live = await refresh(ref_of(owner), owner, kube, deliver)
    if live is None or version_of(live) != version_of(owner) or uid_of(live) != uid_of(owner):
        raise StaleView("the owner has changed since it was planned for")


async def refresh(ref: Ref, known: Object | None, kube: Kube, deliver: Sink) -> Object | None:
    """Read what is live, deliver how it differs from what is known, and return it."""
    live = await kube.get(KINDS[ref.kind], ref.namespace, ref.name)
    if known is not None and (live is None or uid_of(live) != uid_of(known)):
        deliver(Change.DELETE, deleted_after(known))
    if live is not None:
        deliver(Change.UPSERT, live)
    return live


def irreversible(action: Action) -> bool:
    """A Job costs accelerators, and a deletion is final."""
    return isinstance(action, Delete) or (isinstance(action, Create) and kind_of(action.obj) == JOB)


async def carry_out(action: Action, kube: Kube, store: Store, deliver: Sink) -> bool:
    """Do one action; True where something was written. The answer is delivered as if an event had told of it.

    Raises:
        NameTaken: An object of that name has another controller.
        StaleView: What the plan relies on is not so.
        KubeError: The API server refused or did not answer.
    """
    match action:
        case Create(obj=obj, manager=manager):
            return await _create(obj, manager, kube, store, deliver)
        case Apply(obj=obj, manager=manager):
            return await _apply(obj, manager, kube, store, deliver)
        case Confirm():
            await _confirm(action, kube, deliver)
            return False
        case Delete(kind=kind, namespace=namespace, name=name, uid=uid, version=version):
            target = target_of(action)
            await kube.delete(kind, namespace, name, uid=uid, version=version)
            await refresh(target, store.find(target), kube, deliver)  # gone at once, or on its way
            return True


def target_of(action: Action) -> Ref:
    """The object that an action is about; without a name where it is about many."""
    match action:
        case Create(obj=obj) | Apply(obj=obj):
            return ref_of(obj)
        case Delete(kind=kind, namespace=namespace, name=name):
            return Ref(kind.kind, namespace, name)
        case Confirm(kind=kind, namespace=namespace):
            return Ref(kind.kind, namespace, "")


def desired_hash(obj: Object) -> str:
    """The first 32 hex digits of the sha256 of the canonical JSON of a desired object."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


async def _confirm(action: Confirm, kube: Kube, deliver: Sink) -> None:
    live = await kube.list_objects(action.kind, namespace=action.namespace, labels=action.labels)
    unknown = [obj for obj in live if uid_of(obj) not in action.known]
    for obj in unknown:
        deliver(Change.UPSERT, obj)
    if unknown:
        raise StaleView(f"{ref_of(unknown[0])} was not known of", "NotGone")


async def _create(obj: Object, manager: str, kube: Kube, store: Store, deliver: Sink) -> bool:
    known = store.find(ref_of(obj))
    if known is not None:
        _check_ours(known, obj)
        return False
    try:
        made = await kube.create(obj, manager=manager)
    except AlreadyExists:
        live = await _live(obj, kube)
        if live is None:
            raise
        _check_ours(live, obj)
        deliver(Change.UPSERT, live)
        return False
    deliver(Change.UPSERT, made)
    return True


async def _apply(obj: Object, manager: str, kube: Kube, store: Store, deliver: Sink) -> bool:
    digest = desired_hash(obj)
    # What is not ours carries no label of ours, so the store need not know it.
    known = store.find(ref_of(obj))
    live = known or await _live(obj, kube)
    metadata = {**obj["metadata"], "annotations": {**obj["metadata"].get("annotations", {}), ANNOTATION_HASH: digest}}
    if live is not None:
        _check_ours(live, obj)
        if contains(live, {**obj, "metadata": metadata}):
            if known is None:
                deliver(Change.UPSERT, live)
            return False
        metadata["uid"] = uid_of(live)  # never make a new one where the plan saw this one
    written = await kube.apply({**obj, "metadata": metadata}, manager=manager)
    deliver(Change.UPSERT, written)
    return live is None or version_of(written) != version_of(live)


async def _live(obj: Object, kube: Kube) -> Object | None:
    ref = ref_of(obj)
    return await kube.get(kind_of(obj), ref.namespace, ref.name)


def _check_ours(live: Object, desired: Object) -> None:
    """Raise NameTaken where the desired object has a controller and the live one another or none."""
    wanted, found = controller_of(desired), controller_of(live)
    if wanted is not None and (found is None or found["uid"] != wanted["uid"]):
        raise NameTaken(live)


def _owner_text(live: Object) -> str:
    owner = controller_of(live)
    return f"{owner['kind']} {owner['name']}" if owner else "nobody that Trimtab knows"
