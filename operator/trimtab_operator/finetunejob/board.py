"""The progress board: whom to ask, and what they answered. In memory; each observation renews the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trimtab_operator.core.kube import Ref
from trimtab_trainer.config import Progress


@dataclass(frozen=True)
class Target:
    """The first pod of a running attempt."""

    pod: str
    """Its name; another attempt's pod has another."""
    stage: str
    address: str
    """IP address of the pod."""


class ProgressBoard:
    """Owner -> targets, and the newest answer of each."""

    def __init__(self) -> None:
        self._targets: dict[Ref, tuple[Target, ...]] = {}
        self._answers: dict[Target, Progress] = {}

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

    def put(self, target: Target, answer: Progress) -> bool:
        """Keep an answer; True where it is news."""
        news = self._answers.get(target) != answer
        self._answers[target] = answer
        return news

    def progress(self, owner: Ref) -> Mapping[str, Progress]:
        """Stage to the newest answer."""
        return {t.stage: self._answers[t] for t in self.targets(owner) if t in self._answers}
