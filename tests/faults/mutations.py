"""Deliberate bugs, put into the product's source as it is imported, for a test run that must then fail.

A pytest plugin: `TRIMTAB_MUTATION=NAME python -m pytest -p tests.faults.mutations …`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import hypothesis


@dataclass(frozen=True)
class Edit:
    """One replacement in the source of a module."""

    module: str
    old: str
    """Stands in the source exactly once."""
    new: str


_APPLY, _RECONCILE = "trimtab_operator.core.apply", "trimtab_operator.core.reconcile"

MUTATIONS: dict[str, tuple[Edit, ...]] = {
    "uid check removed: a deletion is by name alone": (
        # A version belongs to one uid: without the uid alone nothing would change.
        Edit(
            _APPLY,
            "await kube.delete(kind, namespace, name, uid=uid, version=version)",
            "await kube.delete(kind, namespace, name)",
        ),
    ),
    "uid check removed: anybody's object is adopted": (
        Edit(_APPLY, 'found["uid"] != wanted["uid"]', "False"),
        Edit(_APPLY, "wanted is not None and (found is None or", "wanted is not None and (False or"),
        Edit(_APPLY, 'metadata["uid"] = uid_of(live)', "pass"),
    ),
    "Job created before its attempt number is written": (
        Edit(
            "trimtab_operator.finetunejob.attempts",
            "return Step(State.STARTING, replace(record, attempt=highest + 1, job_uid=None), confirm=highest > 0)",
            "return Step(State.STARTING, replace(record, attempt=highest + 1, job_uid=None), create=True)",
        ),
    ),
    "resourceVersion precondition dropped: the status is written over any version": (
        Edit(_RECONCILE, '("name", "namespace", "resourceVersion")', '("name", "namespace")'),
    ),
    "resourceVersion precondition dropped: a deletion heeds the uid only": (
        Edit(
            _APPLY,
            "await kube.delete(kind, namespace, name, uid=uid, version=version)",
            "await kube.delete(kind, namespace, name, uid=uid)",
        ),
    ),
}


class _Mutating(importlib.abc.MetaPathFinder):
    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = edits

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        edits = [edit for edit in self._edits if edit.module == name]
        if not edits:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(name, spec.origin, edits)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(name, path)
        self._edits = edits

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        source = self.get_data(self.path).decode()
        for edit in self._edits:
            assert source.count(edit.old) == 1, f"{fullname} has {source.count(edit.old)} times: {edit.old}"
            source = source.replace(edit.old, edit.new)
        return compile(source, self.path, "exec")


def _install(name: str) -> None:
    edits = MUTATIONS[name]
    loaded = [edit.module for edit in edits if edit.module in sys.modules]
    assert not loaded, f"imported before the mutation: {loaded}"
    sys.meta_path.insert(0, _Mutating(edits))


def pytest_sessionstart() -> None:
    """One failure is enough: it need not be made smaller, nor remembered."""
    hypothesis.settings.register_profile("mutated", database=None, phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutated")


if name := os.environ.get("TRIMTAB_MUTATION"):
    _install(name)
