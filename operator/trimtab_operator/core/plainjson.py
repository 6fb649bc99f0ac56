"""JSON as a custom resource's status holds it."""

from __future__ import annotations

from typing import Any


def compact(value: dict[str, Any]) -> dict[str, Any]:
    """Without empty lists, maps and strings, at any depth.

    Server-side apply drops a list that became empty, so a status that asked for `[]` would differ from the live one
    for ever.
    """
    kept = {key: _inner(inner) for key, inner in value.items()}
    return {key: inner for key, inner in kept.items() if inner not in ([], {}, "")}


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return compact(value)
    return [_inner(entry) for entry in value] if isinstance(value, list) else value
