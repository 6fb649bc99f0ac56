"""Data beside those that a stage's steps take: prepared in a folder of their own below the stage's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from trimtab_trainer.data.store import PreparedInfo, TokenStore
from trimtab_trainer.prepare.tokens import Tokenized


@dataclass(frozen=True)
class Beside:
    """Such data, written."""

    info: PreparedInfo
    tokenized: Tokenized
    store: TokenStore
    longest_row: int
    """In tokens."""

    def counted_with(self, own: PreparedInfo) -> PreparedInfo:
        """The stage's information `own`, with what was dropped or cut of these data as well."""
        by_cause = Counter(own.dropped_by_cause) + Counter(self.info.dropped_by_cause)
        counts = {"dropped": by_cause.total(), "dropped_by_cause": dict(by_cause)}
        return own.model_copy(update={**counts, "truncated": own.truncated + self.info.truncated})
