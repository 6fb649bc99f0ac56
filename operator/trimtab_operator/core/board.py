"""A board: whom to ask on behalf of whom, and what they answered. In memory; each observation renews the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from trimtab_operator.core.kube import Ref

Target = TypeVar("Target")
Answer = TypeVar("Answer")


class Board(Generic[Target, Answer]):
    """Owner -> targets, and the newest answer of each."""

    def __init__(self) -> None:
        self._targets: dict[Ref, tuple[Target, ...]] = {}
        self._answers: dict[Target, Answer] = {}

    def watch(self, owner: Ref, targets: Iterable[Target]) -> None:
        """Replace the targets of an owner; answers of those no longer watched are dropped."""
        new = tuple(targets)
        for target in self._targets.pop(owner, ()):
            if target not in new:
                self._answers.pop(target, None)
        if new:
            self._targets[owner] = new

    def forget(self, owner: Ref) -> None:
        """The owner is gone."""
        self.watch(owner, ())

    def owners(self) -> list[Ref]:
        """Owners with targets."""
        return list(self._targets)

    def targets(self, owner: Ref) -> tuple[Target, ...]:
        """Whom to ask for an owner."""
        return self._targets.get(owner, ())

    def put(self, target: Target, answer: Answer) -> bool:
        """Keep an answer; True where it is news."""
        news = self._answers.get(target) != answer
        self._answers[target] = answer
        return news

    def answers(self, owner: Ref) -> Mapping[Target, Answer]:
        """Target to its newest answer."""
        return {target: self._answers[target] for target in self.targets(owner) if target in self._answers}
