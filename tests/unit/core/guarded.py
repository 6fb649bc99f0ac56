"""Raw objects that refuse to be read where the store keeps nothing: whoever reads more than `core.trim` keeps fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from trimtab_operator.core.kube import Object
from trimtab_operator.core.trim import kept_of


class NotKept(AssertionError):
    """A field was asked for that the store does not keep, whether or not the object has it."""


class Guarded(dict[str, Any]):
    """A JSON object of which only the kept fields may be asked for, one by one."""

    def __init__(self, value: Object, kept: dict[str, Any], path: str) -> None:
        self._kept, self._path = kept, path
        super().__init__({key: _guard(inner, kept.get(key), f"{path}.{key}") for key, inner in value.items()})

    def __getitem__(self, key: str) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._check(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._check(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._all()

    def __or__(self, other: Any) -> NoReturn:
        self._all()

    def keys(self) -> NoReturn:
        self._all()

    def values(self) -> NoReturn:
        self._all()

    def items(self) -> NoReturn:
        self._all()

    def _check(self, key: str) -> None:
        if key not in self._kept:
            raise NotKept(f"{self._path}.{key} is read, but core/trim.py keeps nothing of it")

    def _all(self) -> NoReturn:
        raise NotKept(f"all of {self._path} is read, but core/trim.py keeps a part of it")


def guarded(obj: Object) -> Object:
    """The object, whole, such that only what the store keeps may be read."""
    kept = kept_of(obj)
    return obj if kept is None else Guarded(obj, kept, obj["kind"])


def _guard(value: Any, kept: Any, path: str) -> Any:
    if kept is ... or kept is None:  # all is kept, or the field itself can't be asked for
        return value
    if isinstance(value, list):
        return [_guard(item, kept, path) for item in value]
    return Guarded(value, kept, path) if isinstance(value, dict) else value
