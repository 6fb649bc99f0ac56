"""Who waits for whom: owners that look at objects which are not their children."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab_operator.core.kube import Ref


class Interests:
    """Owner -> foreign objects that its last observation looked at, and back. In memory; each observation renews it."""

    def __init__(self) -> None:
        self._targets: dict[Ref, frozenset[Ref]] = {}
        self._owners: dict[Ref, set[Ref]] = {}

    def note(self, owner: Ref, targets: Iterable[Ref]) -> None:
        """Replace what `owner` looks at."""
        new = frozenset(targets)
        for target in self._targets.pop(owner, frozenset()) - new:
            owners = self._owners[target]
            owners.discard(owner)
            if not owners:
                del self._owners[target]
        for target in new:
            self._owners.setdefault(target, set()).add(owner)
        if new:
            self._targets[owner] = new

    def of(self, target: Ref) -> list[Ref]:
        """Owners that look at `target`, in order."""
        return sorted(self._owners.get(target, ()))
