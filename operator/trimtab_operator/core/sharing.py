"""Equal parts of objects, kept in memory once: conditions, selectors and container states are much alike."""

from __future__ import annotations

from collections import OrderedDict
from sys import intern
from typing import Any

_LONGEST_SHARED = 64
"""Characters; longer texts are messages and scripts, which are rarely the same."""
_REMEMBERED = 1024
"""Parts that were met last. What few objects have alike falls out again, and is freed with its objects."""


class Parts:
    """Dicts and lists that were met last, by what they hold."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._parts: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def share(self, value: Any) -> Any:
        """A copy of JSON data, made of parts that other copies are made of, too: nobody may change it."""
        if isinstance(value, str):
            return intern(value) if len(value) <= _LONGEST_SHARED else value
        if isinstance(value, dict):
            made: Any = {intern(key): self.share(inner) for key, inner in value.items()}
            return self._known(
                (dict, *(part for key, inner in made.items() for part in (key, *_identity(inner)))), made
            )
        if isinstance(value, list):
            made = [self.share(item) for item in value]
            return self._known((list, *(part for item in made for part in _identity(item))), made)
        return value

    def _known(self, key: tuple[Any, ...], made: Any) -> Any:
        known = self._parts.get(key)
        if known is not None:
            self._parts.move_to_end(key)
            return known
        self._parts[key] = made
        if len(self._parts) > self._remembered:
            self._parts.popitem(last=False)
        return made


def _identity(value: Any) -> tuple[type, Any]:
    """What tells two shared values apart; the part that holds them keeps them alive, so that no id is used again."""
    return type(value), id(value) if isinstance(value, dict | list) else value
