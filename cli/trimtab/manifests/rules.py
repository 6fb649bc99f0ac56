"""A CRD's CEL rules, evaluated as the API server evaluates them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import cel

from trimtab.manifests.schema import Schema, place

_ABSENT = object()


def broken_rules(new: Any, old: Any | None, schema: Schema) -> list[str]:
    """Messages of the rules that the object breaks.

    Args:
        new: the object, defaults set, valid by its schema.
        old: the object that it replaces; None where it is created.
        schema: the CRD's schema. A rule that names `oldSelf` holds on updates only, between values that correspond:
            the same field, or items of a list-map with the same key.
    """
    return list(_walk(new, _ABSENT if old is None else old, schema, ()))


def _walk(new: Any, old: Any, schema: Schema, path: tuple[str | int, ...]) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = "oldSelf" in rule["rule"]
        if transition and old is _ABSENT:
            continue
        fault = _fault(rule, new, old if transition else _ABSENT)
        if fault is not None:
            yield f"{place(path)}: {fault}" if path else fault
    if isinstance(new, dict):
        more = schema.get("additionalProperties")
        for name, child in new.items():
            below = schema.get("properties", {}).get(name, more)
            if isinstance(below, dict):
                former = old.get(name, _ABSENT) if isinstance(old, dict) else _ABSENT
                yield from _walk(child, former, below, (*path, name))
    elif isinstance(new, list) and "items" in schema:
        keys = schema.get("x-kubernetes-list-map-keys", ())
        for index, item in enumerate(new):
            yield from _walk(item, _correlated(item, old, keys), schema["items"], (*path, index))


def _correlated(item: Any, old: Any, keys: tuple[str, ...]) -> Any:
    if not keys or not isinstance(old, list):
        return _ABSENT
    return next((former for former in old if all(former.get(key) == item.get(key) for key in keys)), _ABSENT)


def _fault(rule: dict[str, str], new: Any, old: Any) -> str | None:
    context = cel.Context(
        {"self": new} | ({} if old is _ABSENT else {"oldSelf": old}), {"indexOf": _index_of, "sum": math.fsum}
    )
    try:
        if _program(rule["rule"]).execute(context) is True:
            return None
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        return f"Invalid value: {error} evaluating rule: {rule.get('message', rule['rule'])}"
    return f"Invalid value: {rule.get('message', 'failed rule: ' + rule['rule'])}"


@cache
def _program(rule: str) -> cel.Program:
    return cel.compile(rule)


def _index_of(items: list[Any], item: Any) -> int:
    """Kubernetes' list function, which is no part of CEL itself."""
    return items.index(item) if item in items else -1
