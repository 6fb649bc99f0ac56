"""Plan every epoch's rows: hold out, mix, pack, order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab_trainer.config import PrepareStage, StageType
from trimtab_trainer.data.mixture import epoch_generator, epoch_records, hold_out, quotas
from trimtab_trainer.data.pack import document_rows, pair_rows, record_rows, shuffle_rows
from trimtab_trainer.data.store import VALIDATION, Int64, RowPlan, TokenStore, epoch_name, write_plan
from trimtab_trainer.errors import BadData


@dataclass(frozen=True)
class Planned:
    """Counts of the plans that were written; the names are those of `PreparedInfo`."""

    records: int
    tokens: int
    all_tokens: int
    """Tokens of all steps, over all epochs."""
    validation_records: int
    epoch_rows: list[int]
    total_steps: int


def split(stage: PrepareStage, by_set: Sequence[Int64]) -> tuple[list[Int64], Int64]:
    """Training records of each data set, and all held-out records.

    `by_set` holds the training sets and, after them, the validation sets.

    Raises:
        BadData: the fraction holds out nothing, or leaves nothing to train on.
    """
    training, own = list(by_set[: len(stage.data)]), list(by_set[len(stage.data) :])
    fraction = stage.validation.fraction if stage.validation else None
    if fraction is not None:
        for i, records in enumerate(training):
            kept, held = hold_out(len(records), fraction, stage.recipe.seed, i)
            training[i] = records[kept]
            own.append(records[held])
        for part, what in ((own, "holds out nothing"), (training, "leaves nothing to train on")):
            if not sum(map(len, part)):
                total = sum(len(records) for records in by_set[: len(stage.data)])
                raise BadData(
                    f"validation.fraction {fraction} of {total} records {what}; change it, or give validation.data"
                )
    return training, np.concatenate([np.empty(0, dtype=np.int64), *own])


def plan_rows(stage: PrepareStage, store: TokenStore, by_set: Sequence[Int64], folder: Path) -> Planned:
    """Write the plan of each epoch that the steps reach, and of the held-out rows."""
    training, held = split(stage, by_set)
    recipe = stage.recipe
    lengths = store.lengths()
    quota = quotas(
        [len(records) for records in training],
        [source.weight for source in stage.data],
        [source.cap for source in stage.data],
    )
    epoch_rows: list[int] = []
    tokens = all_tokens = steps = 0
    for epoch in range(recipe.epochs):
        records = epoch_records(training, quota, recipe.seed, epoch)
        plan = shuffle_rows(
            _rows(stage, records, lengths),
            epoch_generator(recipe.seed, epoch),
            keep_last=stage.type is StageType.PRETRAIN,
        )
        write_plan(folder, epoch_name(epoch), plan, store)
        if epoch == 0:
            tokens = plan.tokens
        epoch_rows.append(len(plan))
        batches = -(-len(plan) // recipe.global_batch_size)
        used = batches if recipe.max_steps is None else min(batches, recipe.max_steps - steps)
        steps += used
        all_tokens += plan.tokens * used // batches
        if steps == recipe.max_steps:
            break
    if len(held):
        write_plan(folder, VALIDATION, _rows(stage, held, lengths), store)
    return Planned(sum(quota), tokens, all_tokens, len(held), epoch_rows, steps)


def _rows(stage: PrepareStage, records: Int64, lengths: Int64) -> RowPlan:
    if stage.type is StageType.DPO:
        return pair_rows(records, lengths, stage.max_length, stage.packing)
    build = document_rows if stage.type is StageType.PRETRAIN else record_rows
    return build(records, lengths[records], stage.max_length, stage.packing)
