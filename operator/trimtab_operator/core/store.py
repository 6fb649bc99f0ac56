"""Objects as last seen: what plans read instead of the API server, fed by events, lists and our own writes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from trimtab_operator.core.kube import Kind, Object, Ref, ref_of
from trimtab_operator.core.names import LABEL_ENDPOINT, LABEL_JOB
from trimtab_operator.core.refusals import Refusal, Refusals
from trimtab_operator.core.trim import trim

INDEXED = (LABEL_JOB, LABEL_ENDPOINT)
"""Labels that can be asked for."""
_REMEMBERED_DELETIONS = 10_000
_Index = dict[tuple[str, ...], set[Ref]]


@dataclass(frozen=True)
class Drift:
    """What a complete list of one kind shows that the store has missed."""

    deleted: tuple[Object, ...]
    """In the store since before the list, but not on it."""
    changed: tuple[Ref, ...]
    """On the list with a newer version than the store's, or not in the store."""


class Store:
    """The newest known version of each object, and indices; implements `core.controller.Reader`.

    Versions only grow: an object that is older than the stored one, or than its own deletion, is ignored. So answers to
    writes can be put in at once, and an event that comes late turns nothing back. Objects are shared with the readers,
    who must not change them.
    """

    def __init__(self, refusals: Refusals | None = None) -> None:
        self.refusals = refusals or Refusals()
        self._objects: dict[str, dict[Ref, Object]] = {}
        self._owned: _Index = {}
        self._labelled: _Index = {}
        self._deleted: OrderedDict[str, int] = OrderedDict()

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The stored object; None where there is none."""
        return self.find(Ref(kind.kind, namespace, name))

    def find(self, ref: Ref) -> Object | None:
        """The stored object; None where there is none."""
        return self._objects.get(ref.kind, {}).get(ref)

    def owned(self, kind: Kind, namespace: str, uid: str) -> list[Object]:
        """Objects of `kind` in this namespace whose controller ownerReference has this uid, by name.

        An owner is of its child's namespace: one that claims an owner elsewhere is a forgery.
        """
        return self._resolve(self._owned.get((kind.kind, namespace, uid), set()))

    def labelled(self, kind: Kind, namespace: str, label: str, value: str) -> list[Object]:
        """Objects of `kind` with this label, by name.

        Raises:
            ValueError: The label is not one of `INDEXED`.
        """
        if label not in INDEXED:
            raise ValueError(f"label {label} is not indexed; {', '.join(INDEXED)} are")
        return self._resolve(self._labelled.get((kind.kind, namespace, label, value), set()))

    def refusal(self, ref: Ref) -> Refusal | None:
        """What the API server refused when this owner's last plan was carried out."""
        return self.refusals.get(ref)

    def all_of(self, kind: Kind) -> list[Object]:
        """All objects of a kind, in no order."""
        return list(self._objects.get(kind.kind, {}).values())

    def count(self, kind: Kind) -> int:
        """How many objects of a kind there are."""
        return len(self._objects.get(kind.kind, {}))

    def versions(self, kind: Kind, namespace: str | None = None) -> dict[str, tuple[Ref, int]]:
        """Uid to reference and version of all objects of a kind: what `drift` compares a later list with."""
        return {
            uid_of(obj): (ref, version_of(obj))
            for ref, obj in self._objects.get(kind.kind, {}).items()
            if namespace is None or ref.namespace == namespace
        }

    def upsert(self, obj: Object) -> bool:
        """Keep this version, unless a newer one or the deletion is known; True where the store changed."""
        uid, version = uid_of(obj), version_of(obj)
        if version < self._deleted.get(uid, 0):
            return False
        ref = ref_of(obj)
        old = self.find(ref)
        if old is not None and version <= version_of(old):
            return False
        if old is not None:
            self._drop(ref, old)
            if uid_of(old) != uid:
                self._remember_deletion(uid_of(old), version)
        self._deleted.pop(uid, None)
        trimmed = trim(obj)
        self._objects.setdefault(ref.kind, {})[ref] = trimmed
        for index, key in self._keys(ref, trimmed):
            index.setdefault(key, set()).add(ref)
        return True

    def remove(self, obj: Object) -> bool:
        """Forget an object that was deleted, or left what is watched; True where it was in the store.

        `obj` is the deleted object as the event shows it: with the version of the deletion.
        """
        ref, uid = ref_of(obj), uid_of(obj)
        self._remember_deletion(uid, version_of(obj))
        stored = self.find(ref)
        if stored is None or uid_of(stored) != uid or version_of(stored) > version_of(obj):
            return False
        self._drop(ref, stored)
        return True

    def drift(self, before: dict[str, tuple[Ref, int]], listed: list[Object]) -> Drift:
        """Compare with a complete, consistent list that was asked for after `before` was taken (by `versions`).

        Args:
            before: What the store held when the list was asked for; what came later is not judged.
            listed: Objects, metadata suffices.
        """
        present = {uid_of(obj) for obj in listed}
        deleted = []
        for uid, (ref, _) in before.items():
            stored = self.find(ref)
            if uid not in present and stored is not None and uid_of(stored) == uid:
                deleted.append(deleted_after(stored))
        changed = []
        for obj in listed:
            stored = self.find(ref_of(obj))
            gone_at = self._deleted.get(uid_of(obj), 0)
            if version_of(obj) > gone_at and (stored is None or version_of(obj) > version_of(stored)):
                changed.append(ref_of(obj))
        return Drift(tuple(deleted), tuple(changed))

    def _resolve(self, refs: set[Ref]) -> list[Object]:
        return [self._objects[ref.kind][ref] for ref in sorted(refs)]

    def _drop(self, ref: Ref, obj: Object) -> None:
        del self._objects[ref.kind][ref]
        for index, key in self._keys(ref, obj):
            refs = index[key]
            refs.discard(ref)
            if not refs:
                del index[key]

    def _keys(self, ref: Ref, obj: Object) -> Iterator[tuple[_Index, tuple[str, ...]]]:
        """The index entries of an object."""
        owner = controller_of(obj)
        if owner is not None:
            yield self._owned, (ref.kind, ref.namespace, str(owner["uid"]))
        labels = obj["metadata"].get("labels", {})
        for label in INDEXED:
            if label in labels:
                yield self._labelled, (ref.kind, ref.namespace, label, labels[label])

    def _remember_deletion(self, uid: str, version: int) -> None:
        self._deleted[uid] = max(version, self._deleted.get(uid, 0))
        self._deleted.move_to_end(uid)
        while len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)


def uid_of(obj: Object) -> str:
    """The object's uid."""
    return str(obj["metadata"]["uid"])


def version_of(obj: Object) -> int:
    """The object's resource version: within one kind a larger one is newer."""
    return int(obj["metadata"]["resourceVersion"])


def deleted_after(obj: Object) -> Object:
    """A stored object as its deletion's event would show it: of that version is known only that it comes later."""
    return {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(version_of(obj) + 1)}}


def controller_of(obj: Object) -> Object | None:
    """The ownerReference whose `controller` is true; None where there is none."""
    for reference in obj["metadata"].get("ownerReferences", []):
        if reference.get("controller"):
            return dict(reference)
    return None
