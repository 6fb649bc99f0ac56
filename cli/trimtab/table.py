"""`get` as `kubectl` prints it: a table by the kind's printer columns, JSON or YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from trimtab_operator.core.kube import Object

Column = dict[str, Any]


def _column(name: str, path: str, **more: Any) -> Column:
    return {"name": name, "jsonPath": path, "type": "string", **more}


AGE: Column = {"name": "Age", "jsonPath": ".metadata.creationTimestamp", "type": "date"}
COLUMNS: dict[str, list[Column]] = {
    "Pod": [
        _column("Status", ".status.phase"),
        _column("IP", ".status.podIP", priority=1),
        _column("Node", ".spec.nodeName", priority=1),
        AGE,
    ],
    "Job": [_column("Completions", ".spec.completions"), _column("Succeeded", ".status.succeeded"), AGE],
    "Deployment": [_column("Ready", ".status.readyReplicas"), _column("Wanted", ".spec.replicas"), AGE],
    "Service": [_column("Cluster-IP", ".spec.clusterIP"), AGE],
    "PersistentVolumeClaim": [_column("Status", ".status.phase"), AGE],
    "Event": [
        _column("Type", ".type"),
        _column("Reason", ".reason"),
        _column("Object", ".regarding.name"),
        _column("Note", ".note"),
        AGE,
    ],
}


def table(objects: Sequence[Object], columns: Sequence[Column], *, wide: bool) -> str:
    """Aligned columns under upper-case names; columns of priority 1 with `wide` only."""
    shown = [column for column in columns if wide or not column.get("priority")]
    rows = [["NAME", *(column["name"].upper() for column in shown)]]
    rows += [[obj["metadata"]["name"], *(_cell(obj, column) for column in shown)] for obj in objects]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def document(objects: Sequence[Object], output: str, *, single: bool) -> str:
    """JSON or YAML of one object, or of a List."""
    whole: Any = objects[0] if single else {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    if output == "json":
        return json.dumps(whole, indent=4)
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=110).rstrip()


def _cell(obj: Object, column: Column) -> str:
    value: Any = obj
    for step in column["jsonPath"].strip(".").split("."):
        value = value.get(step) if isinstance(value, dict) else None
    if value is None or value == "":
        return "<none>" if column["name"] in ("IP", "Node") else ""
    return age(str(value)) if column["type"] == "date" else " ".join(str(value).split())


def age(timestamp: str, now: datetime | None = None) -> str:
    """How long ago, in one or two units: 45s, 12m, 3h5m, 2d."""
    seconds = int(((now or datetime.now(UTC)) - datetime.fromisoformat(timestamp)).total_seconds())
    if seconds < 120:
        return f"{max(seconds, 0)}s"
    if seconds < 7200:
        return f"{seconds // 60}m"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60}m"
    return f"{seconds // 86400}d"
