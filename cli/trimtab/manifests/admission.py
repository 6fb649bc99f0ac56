"""What the API server does to a custom resource before it stores it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.manifests.load import Document, InvalidManifest, load
from trimtab.manifests.rules import broken_rules
from trimtab.manifests.schema import Schema, prune, validate, with_defaults
from trimtab_operator.api.crd import RESOURCES, crd
from trimtab_operator.core.kube import Kind, Object

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
"""A DNS subdomain, as far as names of objects go."""
_BUILT_IN = {
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
    ("v1", "PersistentVolumeClaim"),
}
"""Kinds that a manifest may bring beside Trimtab's own."""


class Admission:
    """Pruning, defaults, schema and rules of one custom resource."""

    def __init__(self, definition: dict[str, Any]) -> None:
        spec = definition["spec"]
        version = spec["versions"][0]
        self.kind = Kind(f"{spec['group']}/{version['name']}", spec["names"]["kind"], spec["names"]["plural"])
        self.names: frozenset[str] = frozenset(
            {spec["names"]["singular"], spec["names"]["plural"], *spec["names"]["shortNames"]}
        )
        self.columns: list[dict[str, Any]] = version["additionalPrinterColumns"]
        self._schema: Schema = version["schema"]["openAPIV3Schema"]

    def complete(self, obj: Object) -> Object:
        """The object pruned and with defaults."""
        pruned, _ = prune(_body(obj), self._schema)
        return {**obj, **with_defaults(pruned, self._schema)}

    def unknown_fields(self, obj: Object) -> list[str]:
        """A message for each field that the schema does not know."""
        return prune(_body(obj), self._schema)[1]

    def faults(self, obj: Object, old: Object | None) -> list[str]:
        """What the schema or, where that is content, a rule refuses; `obj` is complete, `old` what it replaces."""
        found = [*_name_faults(obj), *validate(obj, self._schema)]
        return found or broken_rules(obj, old, self._schema)

    @cached_property
    def list_keys(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """Keys of each list-map, by its path of field names."""
        return dict(_list_maps(self._schema, ()))


def _body(obj: Object) -> Object:
    """The object without its metadata, whose fields the schema does not spell out."""
    return {name: value for name, value in obj.items() if name != "metadata"}


def _name_faults(obj: Object) -> Iterator[str]:
    name = obj["metadata"]["name"]
    if not _NAME.fullmatch(name) or len(name) > 253:
        yield f"metadata.name: Invalid value: {name[:80]!r}: use lower-case letters, digits, '-' and '.', at most 253"


def _list_maps(schema: Schema, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    if keys := schema.get("x-kubernetes-list-map-keys"):
        yield path, tuple(keys)
    if "items" in schema:
        yield from _list_maps(schema["items"], path)
    for name, child in schema.get("properties", {}).items():
        yield from _list_maps(child, (*path, name))


ADMISSIONS = {admission.kind.kind: admission for admission in (Admission(crd(resource)) for resource in RESOURCES)}
"""By kind."""


def check(document: Document) -> None:
    """Refuse a manifest that the API server would refuse under `kubectl`'s strict validation.

    Raises:
        InvalidManifest: with every fault that was found.
    """
    obj = document.obj
    admission = ADMISSIONS.get(obj["kind"])
    if admission is None or obj["apiVersion"] != admission.kind.api_version:
        if (obj["apiVersion"], obj["kind"]) in _BUILT_IN:
            return
        known = ", ".join(f"{each.kind.kind} ({each.kind.api_version})" for each in ADMISSIONS.values())
        raise InvalidManifest(
            f"{document}: no kind {obj['kind']!r} in {obj['apiVersion']!r}; local mode knows {known}, "
            "ConfigMap, Secret and PersistentVolumeClaim (v1)"
        )
    faults = admission.unknown_fields(obj)
    faults += admission.faults(admission.complete(obj), None)
    if faults:
        name = f"{obj['kind']} {obj['metadata']['name'][:80]!r}"
        raise InvalidManifest(*(f"{document}: {name}: {fault}" for fault in faults))


def checked(files: Sequence[Path]) -> list[Document]:
    """The files' objects, every one valid by itself.

    Raises:
        InvalidManifest: with all faults of all files.
    """
    faults: list[str] = []
    documents: list[Document] = []
    for path in files:
        try:
            documents += load(path)
        except InvalidManifest as error:
            faults += error.faults
    for document in documents:
        try:
            check(document)
        except InvalidManifest as error:
            faults += error.faults
    if faults:
        raise InvalidManifest(*faults)
    return documents
