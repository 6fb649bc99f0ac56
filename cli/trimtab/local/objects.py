"""Small questions to objects, which all of local mode asks."""

from __future__ import annotations

from datetime import UTC, datetime

from trimtab_operator.core.conditions import find_condition, timestamp
from trimtab_operator.core.kube import Object
from trimtab_operator.core.store import controller_of

Key = tuple[str, str]
"""Namespace and name."""


def now() -> str:
    """The time as Kubernetes writes it."""
    return timestamp(datetime.now(UTC))


def key(obj: Object) -> Key:
    """The object's namespace and name."""
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def controller_uid(obj: Object) -> str | None:
    """The uid of the object's controlling owner."""
    owner = controller_of(obj)
    return str(owner["uid"]) if owner else None


def condition(obj: Object, kind: str) -> Object:
    """The condition of this type; empty where there is none."""
    return find_condition(obj.get("status", {}).get("conditions", []), kind) or {}


def is_true(obj: Object, kind: str) -> bool:
    """Whether a condition holds."""
    return bool(condition(obj, kind).get("status") == "True")


def at(obj: Object, path: str) -> object:
    """The value at a dotted path; None where there is none."""
    found: object = obj
    for step in path.split("."):
        found = found.get(step) if isinstance(found, dict) else None
    return found
