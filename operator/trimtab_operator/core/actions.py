"""What a plan asks for, as values: nothing here touches the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from trimtab_operator.core.kube import Kind, Object
from trimtab_operator.core.names import MANAGER


@dataclass(frozen=True)
class Create:
    """Create once; never applied again. A live object of that name that is not ours is an error, ours is success."""

    obj: Object
    manager: str = MANAGER


@dataclass(frozen=True)
class Apply:
    """Server-side apply, skipped when the hash matches and what is desired is contained in what is live."""

    obj: Object
    manager: str = MANAGER


@dataclass(frozen=True)
class Delete:
    """Delete one object of that uid, children included, as long as it is as the plan has seen it."""

    kind: Kind
    namespace: str
    name: str
    uid: str
    version: str


@dataclass(frozen=True)
class Confirm:
    """Make sure that the plan knew of every live object with these labels; where it did not, it was made too early."""

    kind: Kind
    namespace: str
    labels: Mapping[str, str]
    known: frozenset[str] = frozenset()
    """Uids that the plan has seen; what the store has learnt since does not count."""


Action = Create | Apply | Delete | Confirm


class EventType(StrEnum):
    """Kubernetes' two types of Events."""

    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True)
class EventNote:
    """An Event to emit once the status that it belongs to is written."""

    type: EventType
    reason: str
    message: str
    action: str = "Reconcile"


@dataclass(frozen=True)
class Spent:
    """What an attempt has cost, to be counted once the status that records its end is written."""

    outcome: str
    """succeeded, failed or interrupted"""
    accelerator_seconds: float


@dataclass(frozen=True)
class Plan:
    """What to do now. The actions run in order; the status is written after them, once, and only if it differs.

    An action that relies on something recorded (an attempt's number) is planned only when the *observed* status already
    records it; so a crash between any two writes is repaired by planning again.
    """

    actions: tuple[Action, ...] = ()
    status: Object | None = None
    """The whole desired status with the schema's defaults filled in (it is compared as it is); None leaves it alone."""
    events: tuple[EventNote, ...] = ()
    spent: tuple[Spent, ...] = ()
    """Counted with the status, as events are."""
    requeue_after: float | None = None
    """Seconds until the clock alone may change the plan; None: only an event does."""
    notes: tuple[str, ...] = field(default=())
    """Why, for the log; one short line each."""
