"""Which rows a step takes, who takes which, and how they become tensors. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab_trainer.data.store import LABELS, Row

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """Optimiser step `index` (from 0) takes the rows [start, stop) of the global order of `epoch`.

    The last step of an epoch may take fewer than `globalBatchSize`.
    """

    index: int
    epoch: int
    start: int
    stop: int
    epoch_rows: int

    @property
    def epochs_done(self) -> float:
        """Epochs done after this step, e.g. 1.25."""
        return self.epoch + self.stop / self.epoch_rows


@dataclass(frozen=True)
class MicroBatch:
    """What one process puts through the model at once.

    Attributes:
        input_ids: int64 [R, T]; rows shorter than T are padded on the right.
        position_ids: int64 [R, T]; restart at 0 with each segment. Given without an attention mask, transformers
            isolates segments from that alone. The padding is a segment of its own, so no token sees it.
        loss_mask: bool [R, T]; token t bears loss as a target.
        loss_tokens: loss-bearing tokens of each segment, row by row.
        segment_lengths: of each row, the tokens of its segments, without the padding.
        labels: `data.store.LABELS`, one a segment, row by row.
        record_ids: of the text that each segment is of, row by row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    loss_tokens: tuple[int, ...]
    segment_lengths: tuple[tuple[int, ...], ...]
    labels: NDArray[np.void]
    record_ids: tuple[int, ...] = ()

    @property
    def rankings(self) -> list[int]:
        """Answers of each ranking, in order."""
        firsts = np.flatnonzero(self.labels["position"] == 0)
        sizes: list[int] = np.diff(np.append(firsts, len(self.labels))).tolist()
        return sizes

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            loss_mask=self.loss_mask.to(device),
        )


def plan_steps(epoch_rows: Sequence[int], global_batch_size: int, total_steps: int, first: int = 0) -> Iterator[Step]:
    """The steps from index `first` up to `total_steps`."""
    index = 0
    for epoch, rows in enumerate(epoch_rows):
        for start in range(0, rows, global_batch_size):
            if index == total_steps:
                return
            if index >= first:
                yield Step(index, epoch, start, min(start + global_batch_size, rows), rows)
            index += 1


def rows_of_rank(start: int, stop: int, rank: int, world_size: int) -> range:
    """The rows of [start, stop) that a rank takes. Rank 0 has the most, no rank more than one fewer."""
    return range(start + rank, stop, world_size)


def micro_batch_count(rows: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-batches that every rank runs for a step of so many rows, so that collectives match."""
    most = -(-rows // world_size)
    return -(-most // micro_batch_size)


def in_micro_batches(own: Iterable[T], rows: int, world_size: int, micro_batch_size: int) -> Iterator[list[T]]:
    """This rank's part of so many rows in micro-batches, as many as every rank runs."""
    rest = iter(own)
    for _ in range(micro_batch_count(rows, world_size, micro_batch_size)):
        yield list(islice(rest, micro_batch_size))


def collate(rows: Sequence[Row], padding_id: int) -> MicroBatch:
    """Rows side by side. No rows: one that bears no loss, for a rank that must take part in a step without rows."""
    if not rows:
        ids = torch.full((1, 2), padding_id, dtype=torch.int64)
        mask = torch.zeros(1, 2, dtype=torch.bool)
        return MicroBatch(ids, torch.arange(2)[None], mask, (), ((),), np.empty(0, LABELS))
    length = max(2, *(len(row.input_ids) for row in rows))
    input_ids = torch.full((len(rows), length), padding_id, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), length), dtype=torch.int64)
    loss_mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[i, :size] = torch.from_numpy(row.input_ids)
        loss_mask[i, :size] = torch.from_numpy(row.loss_mask)
        lengths = [*row.segment_lengths, length - size] if size < length else row.segment_lengths
        position_ids[i] = torch.cat([torch.arange(n) for n in lengths])
    loss_tokens = tuple(count for row in rows for count in _loss_tokens(row))
    segment_lengths = tuple(tuple(row.segment_lengths) for row in rows)
    labels = np.concatenate([row.labels for row in rows])
    record_ids = tuple(record for row in rows for record in row.record_ids)
    return MicroBatch(input_ids, position_ids, loss_mask, loss_tokens, segment_lengths, labels, record_ids)


def _loss_tokens(row: Row) -> list[int]:
    """Loss-bearing tokens of each segment."""
    starts = np.cumsum([0, *row.segment_lengths[:-1]])
    counts: list[int] = np.add.reduceat(row.loss_mask, starts, dtype=np.int64).tolist()
    return counts
