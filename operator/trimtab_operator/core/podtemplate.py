"""Pods that fit the restricted Pod Security standard: what is the same for training and serving."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab_operator.api.pod import PodShape, Resources
from trimtab_operator.core.kube import Object

VOLUMES_PATH = "/var/run/trimtab/volumes"
SECRETS_PATH = "/var/run/trimtab/secrets"
CONFIG_PATH = "/etc/trimtab"
HOME = "/home/trimtab"
TERMINATION_LOG = "/dev/termination-log"
_USER = 65532
POD_SECURITY: Object = {
    "runAsNonRoot": True,
    "runAsUser": _USER,
    "runAsGroup": _USER,
    "fsGroup": _USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
_CLAIM = re.compile("pvc://([^/?#]*)")
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


def is_object_name(name: str) -> bool:
    """Whether Kubernetes takes this as the name of an object, and a path can hold it."""
    return len(name) <= 253 and _OBJECT_NAME.fullmatch(name) is not None and ".." not in name


def claim_of(uri: str) -> str | None:
    """The claim of a `pvc://CLAIM/PATH` URI; None for another scheme."""
    found = _CLAIM.match(uri)
    return found[1] if found else None


def owner_reference(owner: Object) -> Object:
    """A controller reference: the child is garbage-collected with its owner."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def resources(asked: Resources | None, *, only: Sequence[str] | None = None) -> Object:
    """A container's resources: requests are the limits where they are not given. `only`: no other resource names."""
    if asked is None:
        return {}
    limits = {name: value for name, value in (asked.limits or {}).items() if only is None or name in only}
    requests = {name: value for name, value in (asked.requests or {}).items() if only is None or name in only}
    found = {"limits": limits, "requests": {**limits, **requests}}
    return {key: value for key, value in found.items() if value}


def environment(ours: Mapping[str, str | Object], user: PodShape) -> list[Object]:
    """Environment variables by name; ours win. A dictionary is a `valueFrom`, a string is taken literally."""
    theirs = {variable.name: variable.value for variable in user.env or []}
    merged: dict[str, str | Object] = {**theirs, **_HOME_VARIABLES, **ours}
    return [
        {"name": name, **({"value": literal(value)} if isinstance(value, str) else {"valueFrom": value})}
        for name, value in merged.items()
    ]


def literal(value: str) -> str:
    """A value that the kubelet turns back into this one: it reads `$(NAME)` as another variable, and `$$` as `$`."""
    return value.replace("$", "$$")


_HOME_VARIABLES: dict[str, str] = {
    "HOME": HOME,
    "USER": "trimtab",
    "TMPDIR": "/tmp",  # noqa: S108 - an emptyDir of the pod's own
    "XDG_CACHE_HOME": f"{HOME}/.cache",
    "HF_HOME": f"{HOME}/.cache/huggingface",
}
"""Writable places; a user without an entry in /etc/passwd needs USER."""

POD_IP: Object = {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}


def claims(names: Mapping[str, bool]) -> tuple[list[Object], list[Object], str]:
    """Volumes, mounts and the JSON table claim -> directory, for claims that map to whether they are read-only."""
    volumes = [
        {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": name} | ({"readOnly": True} if ro else {})}
        for index, (name, ro) in enumerate(names.items())
    ]
    mounts = [
        {"name": f"claim-{index}", "mountPath": f"{VOLUMES_PATH}/{name}"} | ({"readOnly": True} if ro else {})
        for index, (name, ro) in enumerate(names.items())
    ]
    return volumes, mounts, json.dumps({name: f"{VOLUMES_PATH}/{name}" for name in names}, sort_keys=True)


def secrets(names: Iterable[str]) -> tuple[list[Object], list[Object]]:
    """Volumes and read-only mounts of Secrets."""
    ordered = sorted(set(names))
    volumes = [
        {"name": f"secret-{index}", "secret": {"secretName": name, "defaultMode": 0o440}}
        for index, name in enumerate(ordered)
    ]
    mounts = [
        {"name": f"secret-{index}", "mountPath": f"{SECRETS_PATH}/{name}", "readOnly": True}
        for index, name in enumerate(ordered)
    ]
    return volumes, mounts


def container(name: str, image: str, command: Sequence[str], mounts: Sequence[Object], **fields: Any) -> Object:
    """A container with a read-only root, no privilege, and the mounts that every pod of ours has."""
    return {
        "name": name,
        "image": image,
        "command": list(command),
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_PATH, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of the pod's own
            {"name": "home", "mountPath": HOME},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
            *mounts,
        ],
        **{key: value for key, value in fields.items() if value},
    }


def template(
    shape: PodShape,
    *,
    labels: Mapping[str, str],
    config_map: str,
    container: Object,
    volumes: Sequence[Object],
    grace_seconds: int,
    **fields: Any,
) -> Object:
    """A pod template: the user's narrow shape, our security settings, config and scratch volumes."""
    shared = shape.resources.shared_memory if shape.resources else None
    spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": grace_seconds,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": config_map}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "home", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"} | ({"sizeLimit": shared} if shared else {})},
            *volumes,
        ],
        **_placement(shape),
        **fields,
    }
    metadata: Object = {"labels": {**(shape.labels or {}), **labels}}
    if shape.annotations:
        metadata["annotations"] = dict(shape.annotations)
    return {"metadata": metadata, "spec": spec}


def _placement(shape: PodShape) -> Object:
    found = shape.model_dump(
        mode="json",
        by_alias=True,
        exclude_none=True,
        include={
            "node_selector",
            "tolerations",
            "priority_class_name",
            "runtime_class_name",
            "service_account_name",
            "image_pull_secrets",
        },
    )
    return {key: value for key, value in found.items() if value}
