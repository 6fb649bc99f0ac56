"""Conditions as Kubernetes' API conventions describe them, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from trimtab_operator.core.kube import Object

MAX_MESSAGE = 4096


def set_condition(
    conditions: Sequence[Object],
    kind: str,
    status: bool | None,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
) -> list[Object]:
    """The conditions with this one set, in the same order, a new one last.

    Args:
        conditions: The list as it is; not changed.
        kind: The condition's type.
        status: None is `Unknown`.
        reason: One CamelCase word.
        message: Cut to `MAX_MESSAGE` characters, the end is kept too.
        generation: The object's generation that this is about.
        now: Becomes `lastTransitionTime` where the status differs from before.
    """
    text = "Unknown" if status is None else str(status)
    old = find_condition(conditions, kind)
    since = old["lastTransitionTime"] if old is not None and old["status"] == text else timestamp(now)
    new: Object = {
        "type": kind,
        "status": text,
        "reason": reason,
        "message": shorten(message, MAX_MESSAGE),
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }
    if old is None:
        return [*conditions, new]
    return [new if entry["type"] == kind else entry for entry in conditions]


def find_condition(conditions: Sequence[Object], kind: str) -> Object | None:
    """The condition of this type; None where it is not set."""
    return next((entry for entry in conditions if entry["type"] == kind), None)


def shorten(text: str, bound: int) -> str:
    """At most `bound` characters: start and end, since a traceback's cause stands last."""
    if len(text) <= bound:
        return text
    head = (bound - 3) // 2
    return f"{text[:head]}...{text[-(bound - 3 - head) :]}"


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as Kubernetes writes times."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
