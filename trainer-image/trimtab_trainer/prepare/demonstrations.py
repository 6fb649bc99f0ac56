"""The demonstrations of a `reward` stage: answers as people would give them, whose mean score becomes its offset.

Each is scored where the reward of a sampled answer will be read, so it ends with its last answer: later turns are left
off, and so is what the template writes behind the end of turn. One plan has them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trimtab_trainer.config import PrepareStage, StageType
from trimtab_trainer.data.encode import EncoderSettings
from trimtab_trainer.data.pack import record_rows
from trimtab_trainer.data.store import DEMONSTRATIONS, Int64, PreparedInfo, TokenStore
from trimtab_trainer.errors import placed
from trimtab_trainer.prepare.beside import Beside, write_beside
from trimtab_trainer.prepare.sources import DataSet
from trimtab_trainer.prepare.tokens import tokenize
from trimtab_trainer.settings import Loss


def prepare_demonstrations(
    stage: PrepareStage, sets: Sequence[DataSet], encoder: EncoderSettings, info: PreparedInfo, draft: Path
) -> Beside:
    """Tokenize the demonstrations, and plan their rows.

    Args:
        stage: of type `reward`, with demonstrations.
        sets: those of the demonstrations.
        encoder: of the comparisons.
        info: of the comparisons.
        draft: the stage's folder, below which the demonstrations get their own.

    Raises:
        BadData: a record can't be used and may not be dropped.
    """
    folder = draft / DEMONSTRATIONS
    folder.mkdir()
    as_sft = stage.model_copy(
        update={
            "type": StageType.SFT,
            "data": [data.source for data in sets],
            "validation": None,
            "loss": Loss.COMPLETION,
            "max_dropped": stage.max_dropped - info.dropped,
        }
    )
    with placed("demonstrations"):
        tokenized, store = tokenize(as_sft, sets, replace(encoder, loss=as_sft.loss), info.vocabulary_size, folder)
    records = np.concatenate(tokenized.by_set)
    plan = record_rows(records, _answered(store)[records], stage.max_length, stage.packing)
    return write_beside(folder, as_sft, info, tokenized, store, plan, records=len(records), total_steps=0)


def _answered(store: TokenStore) -> Int64:
    """int64 [N]: tokens of each record up to the end of its answer, the last token that bears loss."""
    bounds = zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    return np.array([np.flatnonzero(store.loss[start:stop])[-1] + 1 for start, stop in bounds], dtype=np.int64)
