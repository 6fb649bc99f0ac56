"""Plan every epoch's rows: hold out, mix, pack, order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab_trainer.config import COMPARING, PrepareStage, StageType
from trimtab_trainer.data.mixture import Stream, epoch_generator, hold_out, quotas, replay, replay_targets, sample
from trimtab_trainer.data.pack import document_rows, ranking_rows, record_rows, shuffle_rows
from trimtab_trainer.data.store import (
    VALIDATION,
    Int64,
    RowPlan,
    TokenStore,
    epoch_name,
    task_of,
    task_plan,
    write_plan,
)
from trimtab_trainer.errors import BadData
from trimtab_trainer.prepare.reading import wording_count
from trimtab_trainer.prepare.tokens import Tokenized


@dataclass(frozen=True)
class Planned:
    """Counts of the plans that were written; the names are those of `PreparedInfo`."""

    records: int
    tokens: int
    replayed_loss_tokens: int
    all_tokens: int
    """Tokens of all steps, over all epochs."""
    validation_records: int
    held_out_tasks: dict[str, int]
    epoch_rows: list[int]
    total_steps: int
    longest_row: int
    """Tokens of the longest row of any epoch; of `ppo` with the longest answer."""


class Mixture:
    """What each epoch takes of the data sets, in the order of the epochs."""

    def __init__(self, stage: PrepareStage, training: Sequence[Int64], loss_tokens: Int64) -> None:
        """`training`: of each entry of `stage.data` its training records; `loss_tokens`: of every text."""
        self._seed = stage.recipe.seed
        self._loss_tokens = loss_tokens
        streams = [
            Stream(records, wording_count(stage, i), self._seed, i) if len(records) else None
            for i, records in enumerate(training)
        ]
        mixed = [(stream, source) for stream, source in zip(streams, stage.data, strict=True) if source.in_mixture]
        self.quotas = quotas(
            [len(stream.records) if stream else 0 for stream, _ in mixed],
            [source.weight for _, source in mixed],
            [source.cap for _, source in mixed],
        )
        self._mixed = [stream for stream, _ in mixed]
        self._replayed = [
            (stream, source.replay_fraction)
            for stream, source in zip(streams, stage.data, strict=True)
            if stream and source.replay_fraction is not None
        ]
        self._positions = [0] * len(self._replayed)

    def next_epoch(self, epoch: int) -> tuple[Int64, int]:
        """Text ids of `epoch` in training order, and how many of their loss-bearing tokens are replayed."""
        drawn = [
            stream.take(epoch * quota, (epoch + 1) * quota)
            for stream, quota in zip(self._mixed, self.quotas, strict=True)
            if stream
        ]
        targets = replay_targets(
            [fraction for _, fraction in self._replayed], sum(int(self._loss_tokens[ids].sum()) for ids in drawn)
        )
        replayed = 0
        for i, ((stream, _), target) in enumerate(zip(self._replayed, targets, strict=True)):
            ids = replay(stream, self._positions[i], target, self._loss_tokens)
            self._positions[i] += len(ids)
            replayed += int(self._loss_tokens[ids].sum())
            drawn.append(ids)
        return epoch_generator(self._seed, epoch).permutation(np.concatenate(drawn)), replayed


def split(stage: PrepareStage, tokenized: Tokenized) -> tuple[list[Int64], dict[str, Int64]]:
    """Records of each entry of `stage.data` but those of the fraction, and all held-out records by their plan.

    A fraction is held out of what the mixture takes; few-shot examples are kept for training.

    Raises:
        BadData: the fraction holds out nothing, or leaves nothing to train on, or would hold out examples.
    """
    training, own = list(tokenized.by_set[: len(stage.data)]), list(tokenized.by_set[len(stage.data) :])
    fraction, seed = stage.validation.fraction if stage.validation else None, stage.recipe.seed
    held: dict[str, list[Int64]] = {}
    for i, source in enumerate(stage.data):
        if source.held_out_task is not None:
            records = training[i]
            held.setdefault(task_plan(source.held_out_task), []).append(
                records[sample(len(records), source.cap, seed, i)]
            )
    mixed = [i for i, source in enumerate(stage.data) if source.in_mixture]
    if fraction is not None:
        total = sum(len(training[i]) for i in mixed)
        for i in mixed:
            records, examples = training[i], tokenized.examples[i]
            kept, out = hold_out(len(records), fraction, seed, i, examples)
            if examples[out].any():
                raise BadData(
                    f"validation.fraction {fraction} of {stage.data[i].uri} would hold out few-shot examples; "
                    f"lower it, or give validation.data"
                )
            training[i] = records[kept]
            own.append(records[out])
        for part, what in ((own, "holds out nothing"), ([training[i] for i in mixed], "leaves nothing to train on")):
            if not sum(map(len, part)):
                raise BadData(
                    f"validation.fraction {fraction} of {total} records {what}; change it, or give validation.data"
                )
    if own:
        held[VALIDATION] = own
    return training, {name: np.concatenate(parts) for name, parts in held.items()}


def plan_rows(stage: PrepareStage, store: TokenStore, tokenized: Tokenized, folder: Path) -> Planned:
    """Write the plan of each epoch that the steps reach, and of the held-out rows."""
    training, held = split(stage, tokenized)
    recipe = stage.recipe
    mixture = Mixture(stage, training, store.loss_counts())
    epoch_rows: list[int] = []
    records = tokens = replayed = all_tokens = steps = longest = 0
    for epoch in range(recipe.epochs):
        texts, its_replayed = mixture.next_epoch(epoch)
        plan = shuffle_rows(
            _rows(stage, texts, store),
            epoch_generator(recipe.seed, epoch),
            keep_last=stage.type is StageType.PRETRAIN,
        )
        write_plan(folder, epoch_name(epoch), plan, store)
        longest = max(longest, plan.longest)
        if epoch == 0:
            records, tokens, replayed = len(texts), plan.tokens, its_replayed
        epoch_rows.append(len(plan))
        batches = -(-len(plan) // recipe.global_batch_size)
        used = batches if recipe.max_steps is None else min(batches, recipe.max_steps - steps)
        steps += used
        all_tokens += plan.tokens * used // batches
        if steps == recipe.max_steps:
            break
    for name, its_records in held.items():
        write_plan(folder, name, _rows(stage, its_records, store), store)
    validation_records = len(held.pop(VALIDATION, ()))
    tasks = {task_of(name): len(its_records) for name, its_records in held.items()}
    return Planned(
        records,
        tokens,
        replayed,
        all_tokens,
        validation_records,
        tasks,
        epoch_rows,
        steps,
        longest + stage.max_new_tokens,
    )


def _rows(stage: PrepareStage, records: Int64, store: TokenStore) -> RowPlan:
    lengths = store.lengths()
    if stage.type in COMPARING:
        return ranking_rows(records, store.answers()[records], lengths, stage.max_length, stage.packing)
    if stage.type is StageType.PPO:  # each row is one prompt to answer
        return record_rows(records, lengths[records], stage.max_length, packing=False)
    build = document_rows if stage.type is StageType.PRETRAIN else record_rows
    return build(records, lengths[records], stage.max_length, stage.packing)
