"""What a kind brings to the one loop: how to observe it and how to plan for it."""

from __future__ import annotations

from datetime import datetime
from typing import Generic, Protocol, TypeVar

from trimtab_operator.core.actions import Plan
from trimtab_operator.core.kube import Kind, Object, Ref
from trimtab_operator.core.refusals import Refusal
from trimtab_operator.core.settings import Settings

Observation = TypeVar("Observation")


class Reader(Protocol):
    """The store, as controllers see it: local memory, no I/O."""

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The stored object; None where there is none."""

    def owned(self, kind: Kind, namespace: str, uid: str) -> list[Object]:
        """Objects of `kind` in this namespace whose controller ownerReference has this uid, by name."""

    def labelled(self, kind: Kind, namespace: str, label: str, value: str) -> list[Object]:
        """Objects of `kind` with this label, by name."""

    def refusal(self, ref: Ref) -> Refusal | None:
        """What the API server refused when this owner's last plan was carried out; None where nothing was.

        A plan that sees one tells of it in the status, and still asks for the same actions: they are tried again.
        """


class Controller(Protocol, Generic[Observation]):
    """One kind of owner."""

    kind: Kind

    def observe(self, reader: Reader, obj: Object) -> Observation:
        """Everything that the plan may depend on besides the object itself; reads the store only."""

    def plan(self, obj: Object, observation: Observation, settings: Settings, now: datetime) -> Plan:
        """Pure: the same arguments give the same plan."""

    def interested(self, obj: Object) -> list[Ref]:
        """Owners to wake beside the controlling one when this (child or foreign) object changes."""
