"""Regular expressions of RE2, by Arrow: whatever a model writes, a match takes time linear in the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab_trainer.errors import BadConfiguration


class Expression:
    """One that is found anywhere in a text."""

    def __init__(self, pattern: str, place: str) -> None:
        """`place`: for messages, where the expression stands.

        Raises:
            BadConfiguration: it is not valid.
        """
        import pyarrow as pa  # takes half a second, and few stages need it
        import pyarrow.compute as pc

        self._pattern, self._place = pattern, place
        self._text, self._compute, self._invalid = pa.scalar, pc, pa.ArrowInvalid
        try:
            self.is_found("")
        except pa.ArrowInvalid as error:
            raise BadConfiguration(
                f"{place}: {error}; write it in RE2's syntax, which has no look-around and no back-references"
            ) from error

    def is_found(self, text: str) -> bool:
        """Whether it matches a part of the text."""
        return bool(self._compute.match_substring_regex(self._text(text), pattern=self._pattern).as_py())

    def the_group(self, name: str) -> Callable[[str], str | None]:
        """What gives the text of the expression's only group, where the expression is found first; None where it isn't.

        Raises:
            BadConfiguration: it has no such group, or others.
        """
        try:
            names = [field.name for field in self._groups("").type]
        except self._invalid:  # groups without a name, or no group
            names = []
        if names != [name]:
            raise BadConfiguration(
                f"{self._place}: what counts is not marked; put it into a group (?P<{name}>…), the only one there is: "
                "write others as (?:…)"
            )

        def group(text: str) -> str | None:
            found = self._groups(text).as_py()
            return None if found is None else str(found[name])

        return group

    def _groups(self, text: str) -> Any:
        return self._compute.extract_regex(self._text(text), pattern=self._pattern)
