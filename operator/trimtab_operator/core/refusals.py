"""What the API server refused lately: the next plan of the same owner sees it and says so in the status."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab_operator.core.kube import Ref


@dataclass(frozen=True)
class Refusal:
    """A write that was refused: by the schema, an admission rule, a quota or RBAC, or because the name is taken."""

    target: Ref
    """The object that could not be written or deleted."""
    reason: str
    """One CamelCase word: the Status object's reason (`Invalid`, `Forbidden`), or `NameTaken`."""
    message: str
    """The server's own words."""


class Refusals:
    """The latest refusal of each owner; one whose writes have all succeeded since has none."""

    def __init__(self) -> None:
        self._by_owner: dict[Ref, Refusal] = {}

    def get(self, owner: Ref) -> Refusal | None:
        """The standing refusal of an owner; None where there is none."""
        return self._by_owner.get(owner)

    def record(self, owner: Ref, refusal: Refusal) -> None:
        """Keep a refusal until `clear`; a later one replaces it."""
        self._by_owner[owner] = refusal

    def clear(self, owner: Ref) -> None:
        """The owner's writes went through, or it is gone."""
        self._by_owner.pop(owner, None)
