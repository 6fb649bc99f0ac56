"""Records that can't be used: fail at the first one, or drop them, name them, and fail above `maxDropped`."""

from __future__ import annotations

from collections import Counter

import structlog

from trimtab_trainer.data.encode import Place
from trimtab_trainer.data.records import DropCause, InvalidRecord
from trimtab_trainer.errors import BadData
from trimtab_trainer.settings import OnInvalid

log = structlog.get_logger()

_NAMED = 10


class Rejects:
    """Counts dropped records of one stage. `maxDropped` covers all of them, whatever the reason."""

    def __init__(self, on_invalid: OnInvalid, max_dropped: int) -> None:
        self._on_invalid = on_invalid
        self._max_dropped = max_dropped
        self._reasons: list[str] = []
        self.by_cause: Counter[DropCause] = Counter()

    @property
    def dropped(self) -> int:
        """Records dropped so far."""
        return len(self._reasons)

    @property
    def first(self) -> str:
        """Place, cause and remedy of the first dropped record; empty without one."""
        return self._reasons[0] if self._reasons else ""

    def invalid(self, place: Place, error: InvalidRecord) -> None:
        """A record that is not valid.

        Raises:
            BadData: under `onInvalid: fail`, or when too many are dropped.
        """
        if self._on_invalid is OnInvalid.FAIL:
            raise BadData(f"{place}: {error.cause}; {error.remedy}")
        self.drop(place, error, DropCause.INVALID)

    def drop(self, place: Place, error: InvalidRecord, why: DropCause) -> None:
        """Leave a record out, and say so.

        Raises:
            BadData: more than `maxDropped` records are dropped; the message names the first ones.
        """
        self._reasons.append(f"{place}: {error.cause}; {error.remedy}")
        self.by_cause[why] += 1
        log.warning("record dropped", place=str(place), cause=error.cause)
        if self.dropped > self._max_dropped:
            shown = ". ".join(self._reasons[:_NAMED])
            raise BadData(
                f"more than maxDropped = {self._max_dropped} records had to be dropped; correct them or raise "
                f"maxDropped. {shown}"
            )
