"""What a Lease says and what follows from it: pure functions; `core.leader` acts on them.

A candidate never compares the Lease's timestamps with its own clock: it measures on its own monotonic clock how long
the record has not changed. A holder's record changes at each renewal, even where its wall clock stands still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from trimtab_operator.core.kube import LEASE, Object

_RELEASED_SECONDS = 1
"""`leaseDurationSeconds` of a released Lease: the API takes no 0."""


@dataclass(frozen=True)
class Record:
    """The part of a Lease's spec that its holder writes; equal records mean that nobody has renewed."""

    holder: str
    duration: float
    """Seconds that the holder asked others to wait for."""
    transitions: int
    acquired: str
    renewed: str


@dataclass(frozen=True)
class Seen:
    """The newest record, when on our own clock it was first seen, and how long from then on it is respected."""

    lease: Object | None
    record: Record | None
    since: float
    respected: float


def record_of(lease: Object, default_duration: float) -> Record:
    """The record of a Lease; what someone has cleared by hand counts as nobody's."""
    spec = lease.get("spec") or {}
    return Record(
        holder=spec.get("holderIdentity") or "",
        duration=float(spec.get("leaseDurationSeconds") or default_duration),
        transitions=int(spec.get("leaseTransitions") or 0),
        acquired=spec.get("acquireTime") or "",
        renewed=spec.get("renewTime") or "",
    )


def look(before: Seen | None, lease: Object | None, now: float, identity: str, default_duration: float) -> Seen:
    """What is known after reading (or writing) the Lease at `now`, seconds of the monotonic clock.

    A Lease that vanishes is respected as long as its record would have been: its holder may not know yet.
    """
    if lease is None:
        if before is None:
            return Seen(None, None, now, 0.0)
        if before.record is None:
            return before
        mine = before.record.holder in ("", identity)
        return Seen(None, None, now, 0.0 if mine else before.respected)
    record = record_of(lease, default_duration)
    if before is not None and before.record == record:
        return Seen(lease, record, before.since, before.respected)
    return Seen(lease, record, now, record.duration if record.holder else 0.0)


def may_take(seen: Seen, now: float, identity: str) -> bool:
    """Whether we may write ourselves into the Lease: it is ours, nobody's, or has not changed for long enough."""
    if seen.record is not None and seen.record.holder == identity:
        return True
    return now - seen.since >= seen.respected


def held(
    seen: Seen, identity: str, name: str, namespace: str, duration: float, wall: datetime, owner: Object | None = None
) -> Object:
    """The Lease with us as its holder, renewed; its resourceVersion is the precondition. `owner`: of a new one."""
    record = seen.record
    renewed = _after(record.renewed if record else "", wall)
    spec = {"holderIdentity": identity, "leaseDurationSeconds": math.ceil(duration), "renewTime": renewed}
    if record is None:
        spec |= {"acquireTime": renewed, "leaseTransitions": 0}
    elif record.holder != identity:
        spec |= {"acquireTime": renewed, "leaseTransitions": record.transitions + 1}
    return _written(seen.lease, name, namespace, spec, owner)


def released(lease: Object, wall: datetime) -> Object:
    """The Lease without a holder, so that a successor takes it at its next look; the transitions stay."""
    now = _after((lease["spec"].get("renewTime") or ""), wall)
    spec = {"holderIdentity": "", "leaseDurationSeconds": _RELEASED_SECONDS, "renewTime": now, "acquireTime": now}
    return _written(lease, lease["metadata"]["name"], lease["metadata"]["namespace"], spec)


def _written(lease: Object | None, name: str, namespace: str, spec: Object, owner: Object | None = None) -> Object:
    """What to PUT or POST: of a live Lease everything else stays as it is."""
    owned = {"ownerReferences": [owner]} if owner else {}
    base: Object = lease or {"metadata": {"name": name, "namespace": namespace, **owned}}
    return {**base, "apiVersion": LEASE.api_version, "kind": LEASE.kind, "spec": {**base.get("spec", {}), **spec}}


def _after(before: str, wall: datetime) -> str:
    """The time as a MicroTime, later than `before` whatever the wall clock says: each renewal must be a change."""
    try:
        known = datetime.fromisoformat(before)
    except ValueError:  # there was none, or a hand wrote it
        known = None
    if known is not None and known.tzinfo is not None and known >= wall:
        wall = known + timedelta(microseconds=1)
    return wall.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
