"""The pretraining mix of a `ppo` stage: prepared like data to fine-tune on, in a folder of its own.

Its one plan has the rows of all updates in order: update u takes the rows [u M, (u + 1) M), M = `rowsPerUpdate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trimtab_trainer.config import PrepareStage, StageType
from trimtab_trainer.data.encode import EncoderSettings
from trimtab_trainer.data.mixture import epoch_generator
from trimtab_trainer.data.pack import record_rows, shuffle_rows
from trimtab_trainer.data.store import (
    PRETRAINING_MIX,
    Int64,
    PreparedInfo,
    RowPlan,
    TokenStore,
)
from trimtab_trainer.prepare.beside import Beside, write_beside
from trimtab_trainer.prepare.rows import Mixture
from trimtab_trainer.prepare.sources import DataSet
from trimtab_trainer.prepare.tokens import Tokenized, tokenize
from trimtab_trainer.settings import Loss, OnTooLong


def prepare_mix(
    stage: PrepareStage, sets: Sequence[DataSet], encoder: EncoderSettings, info: PreparedInfo, draft: Path
) -> Beside:
    """Tokenize the mix, and plan the rows of each update.

    Args:
        stage: of type `ppo`, with a mix.
        sets: those of the mix.
        encoder: of the prompts.
        info: of the prompts.
        draft: the stage's folder, below which the mix gets its own.

    Raises:
        BadData: a record can't be used and may not be dropped.
    """
    folder = draft / PRETRAINING_MIX
    folder.mkdir()
    sets = [replace(data, source=data.source.model_copy(update={"running_text": True})) for data in sets]
    as_sft = _as_sft(stage, sets, info.dropped)
    tokenized, store = tokenize(
        as_sft, sets, replace(encoder, loss=as_sft.loss, prompts=False), info.vocabulary_size, folder
    )
    rows = stage.ppo.pretraining_rows(info.global_batch_size) if stage.ppo else 0
    updates = _updates(stage, info)
    plan, records = _stream(as_sft, tokenized, store, updates * rows)
    particular = {"records": records, "global_batch_size": rows, "total_steps": updates}
    return write_beside(folder, as_sft, info, tokenized, store, plan, **particular)


def _as_sft(stage: PrepareStage, sets: Sequence[DataSet], dropped: int) -> PrepareStage:
    """The mix as a stage of its own: conversations, of which long ones are cut, and running text, all packed."""
    return stage.model_copy(
        update={
            "type": StageType.SFT,
            "data": [data.source for data in sets],
            "validation": None,
            "loss": Loss.ASSISTANT,
            "packing": True,
            "on_too_long": OnTooLong.TRUNCATE,
            "max_dropped": stage.max_dropped - dropped,
            "ppo": None,
        }
    )


def _updates(stage: PrepareStage, info: PreparedInfo) -> int:
    """Updates of the whole stage."""
    total, steps = 0, 0
    for rows in info.epoch_rows:
        for start in range(0, rows, info.global_batch_size):
            if steps == info.total_steps or stage.ppo is None:
                return total
            total += stage.ppo.updates(min(info.global_batch_size, rows - start))
            steps += 1
    return total


def _stream(stage: PrepareStage, tokenized: Tokenized, store: TokenStore, rows: int) -> tuple[RowPlan, int]:
    """So many rows of passes over the mix, one after the other, each shuffled anew; and the records of one pass."""
    mixture = Mixture(stage, tokenized.by_set, store.loss_counts())
    lengths = store.lengths()
    segments: list[Int64] = []
    sizes: list[Int64] = []
    planned = 0
    while planned < rows:
        texts, _ = mixture.next_epoch(len(segments))
        plan = record_rows(texts, lengths[texts], stage.max_length, stage.packing)
        plan = shuffle_rows(plan, epoch_generator(stage.recipe.seed, len(segments)), keep_last=False)
        used = min(len(plan), rows - planned)
        segments.append(plan.segments[: plan.rows[used]])
        sizes.append(np.diff(plan.rows[: used + 1]))
        planned += used
    starts = np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64)
    return RowPlan(np.concatenate(segments), starts), sum(mixture.quotas)
