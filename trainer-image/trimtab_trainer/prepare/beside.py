"""Data beside those that a stage's steps take: prepared in a folder of their own below the stage's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_trainer.config import PrepareStage
from trimtab_trainer.data.store import PreparedInfo, RowPlan, TokenStore, epoch_name, write_info, write_plan
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


def write_beside(
    folder: Path,
    stage: PrepareStage,
    own: PreparedInfo,
    tokenized: Tokenized,
    store: TokenStore,
    plan: RowPlan,
    **particular: Any,
) -> Beside:
    """Write the one plan of such data and what `info.json` tells.

    Args:
        folder: theirs; it has the tokens already.
        stage: the data as a stage of their own.
        own: of the stage that they stand beside.
        tokenized: what tokenizing them told.
        store: their tokens.
        plan: their rows.
        particular: fields of `PreparedInfo`, those that follow from nothing else here.
    """
    write_plan(folder, epoch_name(0), plan, store)
    counts = {
        "type": stage.type,
        "loss": stage.loss,
        "packing": stage.packing,
        "dropped": sum(tokenized.dropped.values()),
        "dropped_by_cause": tokenized.dropped,
        "truncated": tokenized.truncated,
        "tokens": plan.tokens,
        "validation_records": 0,
        "epochs": 1,
        "epoch_rows": [len(plan)],
    }
    info = own.model_copy(update={**counts, **particular})
    write_info(folder, info)
    return Beside(info, tokenized, store, plan.longest)
