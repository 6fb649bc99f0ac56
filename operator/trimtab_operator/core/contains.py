"""Whether what is desired is already live, whatever the API server added by defaults."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

from trimtab_operator.core.quantity import number

MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "stages": "name",
    "volumeMounts": "mountPath",
    "conditions": "type",
    "ownerReferences": "uid",
}
"""Lists that are maps: their items are matched by this key, and live may hold further ones."""
_QUANTITIES = ("limits", "requests", "capacity", "sizeLimit")


def contains(live: Any, desired: Any, field: str = "") -> bool:
    """True where every desired field is live with an equal value.

    Maps may have more keys live: defaults, and what others set. Lists in `MERGE_KEYS` and `ports` are matched by key,
    in any order; other lists must have the same length and match item by item. An empty desired value is satisfied by
    an absent one. Quantities are compared by value, since the API server rewrites `1000m` as `1`.

    Args:
        live: A JSON value as the API server shows it; None where it is absent.
        desired: A JSON value as a manifest has it.
        field: The name of the field that holds both; says how lists and quantities are compared.
    """
    if isinstance(desired, dict):
        inner = field if field in _QUANTITIES else ""
        return (live is None and not desired) or (
            isinstance(live, dict)
            and all(contains(live.get(key), value, inner or key) for key, value in desired.items())
        )
    if isinstance(desired, list):
        return (live is None and not desired) or (isinstance(live, list) and _list_contains(live, desired, field))
    if field in _QUANTITIES and live is not None:
        return _quantity(live) == _quantity(desired)
    return bool(live == desired) and isinstance(live, bool) == isinstance(desired, bool)


def _list_contains(live: list[Any], desired: list[Any], field: str) -> bool:
    key = _port_key if field == "ports" else MERGE_KEYS.get(field)
    if key is None:
        return len(live) == len(desired) and all(
            contains(theirs, ours) for theirs, ours in zip(live, desired, strict=True)
        )
    name = key if callable(key) else lambda item: item.get(key)
    by_key = {name(item): item for item in live if isinstance(item, dict)}
    return all(name(item) in by_key and contains(by_key[name(item)], item) for item in desired)


def _port_key(port: dict[str, Any]) -> tuple[Any, Any]:
    """A container's ports have a `containerPort`, others a `port`; the same number may stand for TCP and UDP."""
    return port.get("containerPort", port.get("port")), port.get("protocol", "TCP")


def _quantity(value: Any) -> Decimal | str:
    try:
        return number(str(value))
    except InvalidOperation:
        return str(value)
