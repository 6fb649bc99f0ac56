"""Server-side apply: an object as a table from path to leaf, so that ownership is a set of paths.

A path is a tuple of field names; an item of a list-map stands under its key, written as JSON (`{"name":"a"}`).
Other lists are leaves, as are scalars and empty maps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from trimtab_operator.core.kube import Object

Path = tuple[str, ...]
ListKeys = Callable[[Path], tuple[str, ...] | None]
"""Keys of the list-map at a path of field names; None for a list that is replaced as a whole."""

SERVER_FIELDS = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "managedFields")
"""Metadata that only the API server writes."""

_ITEM = "\0"
"""Starts the path element of a list-map's item; no field name does."""

_BUILT_IN = {
    "containers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "conditions": ("type",),
    "ownerReferences": ("uid",),
    "imagePullSecrets": ("name",),
}


def built_in_list_keys(path: Path) -> tuple[str, ...] | None:
    """List-maps of the built-in kinds, as far as Trimtab writes them."""
    return _BUILT_IN.get(path[-1])


def owned_part(obj: Object) -> Object:
    """What an apply owns: everything but the object's identity and what the server writes."""
    metadata = {
        key: value for key, value in obj["metadata"].items() if key not in (*SERVER_FIELDS, "name", "namespace")
    }
    body = {key: value for key, value in obj.items() if key not in ("apiVersion", "kind", "metadata")}
    return {"metadata": metadata, **body} if metadata else body


def flatten(value: Any, list_keys: ListKeys) -> dict[Path, Any]:
    """Path to leaf, in the order of the object."""
    return dict(_leaves(value, (), (), list_keys))


def _leaves(value: Any, path: Path, names: Path, list_keys: ListKeys) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from _leaves(child, (*path, name), (*names, name), list_keys)
    elif isinstance(value, list) and value and (keys := list_keys(names)) and all(_has(item, keys) for item in value):
        for item in value:
            key = json.dumps({name: item[name] for name in keys}, sort_keys=True, separators=(",", ":"))
            yield from _leaves(item, (*path, _ITEM + key), names, list_keys)
    elif path:
        yield path, value


def _has(item: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(item, dict) and all(key in item for key in keys)


def unflatten(leaves: dict[Path, Any]) -> Object:
    """The object again; a list-map's items come in the order in which their first leaves stand."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for step in path[:-1]:
            child = node.setdefault(step, {})
            if not isinstance(child, dict):  # an empty map or a scalar gave way to a map
                child = node[step] = {}
            node = child
        if path[-1] not in node or leaf not in ({}, []):
            node[path[-1]] = leaf
    return {name: _fold(child) for name, child in root.items()}


def _fold(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(name.startswith(_ITEM) for name in node):
        return [_fold(child) for child in node.values()]
    return {name: _fold(child) for name, child in node.items()}


def apply(
    live: Object, desired: Object, owners: dict[str, list[str]], manager: str, list_keys: ListKeys
) -> tuple[Object, dict[str, list[str]]]:
    """Server-side apply with force.

    Args:
        live: the object as it is.
        desired: every field that `manager` wants, and no other.
        owners: paths by manager, as a former call gave them.
        manager: who applies.
        list_keys: which lists are list-maps.

    Returns:
        The merged object, and the owners after it.
    """
    before, wanted = flatten(live, list_keys), flatten(desired, list_keys)
    owned = {name: {_decode(path) for path in paths} for name, paths in owners.items()}
    others = set().union(*(paths for name, paths in owned.items() if name != manager))
    dropped = {path for path in owned.get(manager, set()) - _with_items(wanted) if not _covers(path, others)}
    after = {path: leaf for path, leaf in before.items() if not any(path[: len(drop)] == drop for drop in dropped)}
    for path in wanted:
        after = {old: leaf for old, leaf in after.items() if not (len(old) != len(path) and _nested(old, path))}
    after |= wanted
    changed = {path for path, leaf in wanted.items() if before.get(path, leaf) != leaf}
    owned = {name: paths - changed for name, paths in owned.items()} | {manager: _with_items(wanted)}
    return unflatten(after), {name: sorted(map(_encode, paths)) for name, paths in owned.items() if paths}


def _with_items(leaves: dict[Path, Any]) -> set[Path]:
    """The paths, and those of the list-maps' items: dropping an item drops what others defaulted in it."""
    items = {path[: end + 1] for path in leaves for end, step in enumerate(path) if step.startswith(_ITEM)}
    return set(leaves) | items


def _covers(path: Path, others: set[Path]) -> bool:
    return any(other[: len(path)] == path for other in others)


def _nested(one: Path, other: Path) -> bool:
    short = min(len(one), len(other))
    return one[:short] == other[:short]


def _encode(path: Path) -> str:
    return json.dumps(path)


def _decode(path: str) -> Path:
    return tuple(json.loads(path))
