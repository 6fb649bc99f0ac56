"""What the store keeps of an object: nothing that no plan reads, and equal parts once.

What is compared with what is desired (`core.contains`) stays whole; what is created once and only looked at is cut
down to what is read of it. A reader of another field adds it here: the tests of every plan fail until then.
"""

from __future__ import annotations

from typing import Any

from trimtab_operator.core.kube import CONFIGMAP, JOB, POD, Object
from trimtab_operator.core.sharing import Parts

_DROPPED = "managedFields"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_PARTS = Parts()

Kept = dict[str, Any]
"""Field to what is kept of it: `...` for all; a list's items are cut one by one."""

_METADATA: Kept = dict.fromkeys(
    (
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "labels",
        "ownerReferences",
    ),
    ...,
)
_CONTAINER_STATUS: Kept = dict.fromkeys(("name", "image", "state", "lastState"), ...)
_KEPT: dict[str, Kept] = {
    CONFIGMAP.kind: {"metadata": _METADATA, "immutable": ...},
    JOB.kind: {
        "metadata": _METADATA,
        "spec": dict.fromkeys(("completions", "suspend"), ...),
        "status": {
            "conditions": dict.fromkeys(("type", "status", "reason", "message", "lastTransitionTime"), ...),
            "startTime": ...,
            "succeeded": ...,
        },
    },
    POD.kind: {
        "metadata": {
            **_METADATA,
            "annotations": {"batch.kubernetes.io/job-completion-index": ...},
            "finalizers": ...,
        },
        "spec": {
            "nodeName": ...,
            "containers": {"name": ..., "resources": {"limits": {"memory": ...}}},
        },
        "status": {
            **dict.fromkeys(("phase", "reason", "message", "podIP"), ...),
            "conditions": dict.fromkeys(("type", "status", "reason", "message"), ...),
            "containerStatuses": _CONTAINER_STATUS,
            "initContainerStatuses": _CONTAINER_STATUS,
        },
    },
}


def kept_of(obj: Object) -> Kept | None:
    """What is kept of an object; None for all of it."""
    kept = _KEPT.get(obj["kind"])
    if kept is None or (obj["kind"] == CONFIGMAP.kind and not obj.get("immutable")):  # that one may be applied again
        return None
    return {"apiVersion": ..., "kind": ..., **kept}


def trim(obj: Object) -> Object:
    """The object as the store keeps it: a copy, of which other objects have parts, so that nobody may change it."""
    kept = kept_of(obj)
    cut: Object = obj if kept is None else _cut(obj, kept)
    metadata = {key: value for key, value in cut["metadata"].items() if key != _DROPPED}
    if _LAST_APPLIED in (metadata.get("annotations") or {}):
        metadata["annotations"] = {key: text for key, text in metadata["annotations"].items() if key != _LAST_APPLIED}
    shared: Object = _PARTS.share({**cut, "metadata": metadata})
    return shared


def _cut(value: Any, kept: Any) -> Any:
    if kept is ... or value is None:
        return value
    if isinstance(value, list):
        return [_cut(item, kept) for item in value]
    return {key: _cut(value[key], inner) for key, inner in kept.items() if key in value}
