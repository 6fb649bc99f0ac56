"""From records to rows of at most `maxLength` tokens. Pure and deterministic."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque

import numpy as np

from trimtab_trainer.data.store import Int64, RowPlan


def best_fit_decreasing(lengths: Int64, capacity: int) -> list[list[int]]:
    """Bins of item indices: each item, longest first, goes where it leaves the least room (ties: the oldest bin).

    Needs at most 11/9 of the optimal number of bins, plus one (Johnson 1973). O(n log capacity).
    """
    bins: list[list[int]] = []
    by_room: defaultdict[int, deque[int]] = defaultdict(deque)
    rooms: list[int] = []  # ascending, those with at least one bin
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        found = bisect_left(rooms, length)
        if found == len(rooms):
            room, target = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[found]
            target = by_room[room].popleft()
            if not by_room[room]:
                rooms.pop(found)
        bins[target].append(item)
        left = room - length
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(target)
    return bins


def record_rows(records: Int64, lengths: Int64, capacity: int, packing: bool) -> RowPlan:
    """Rows of whole records, in the given order or, with `packing`, several to a row.

    Args:
        records: record ids, int64 [n].
        lengths: their tokens, int64 [n], none above `capacity`.
        capacity: longest row in tokens.
        packing: put several records into one row.
    """
    bins = best_fit_decreasing(lengths, capacity) if packing else [[i] for i in range(len(records))]
    flat = np.array([item for items in bins for item in items], dtype=np.int64)
    segments = np.stack([records[flat], np.zeros_like(flat), lengths[flat]], axis=1)
    return RowPlan(segments, _starts(np.array([len(items) for items in bins], dtype=np.int64)))


def ranking_rows(records: Int64, answers: Int64, lengths: Int64, capacity: int, packing: bool) -> RowPlan:
    """Rows of whole rankings (pairs, for one), whose answers follow each other; with `packing` several to a row.

    Args:
        records: ids of the rankings' first texts, int64 [n]; the other texts have the next ids.
        answers: texts of each ranking, int64 [n].
        lengths: tokens of every text there is, int64.
        capacity: longest text in tokens; a row holds as many as the largest ranking has answers.
        packing: put several rankings into one row; none is ever split.
    """
    totals = np.add.reduceat(lengths[_runs(records, answers)], _starts(answers)[:-1])
    rankings = record_rows(np.arange(len(records)), totals, int(answers.max()) * capacity, packing)
    order = rankings.segments[:, 0]
    texts = _runs(records[order], answers[order])
    rows = _starts(answers[order])[rankings.rows]
    return RowPlan(np.stack([texts, np.zeros_like(texts), lengths[texts]], axis=1), rows)


def _runs(firsts: Int64, counts: Int64) -> Int64:
    """first, first + 1, … of each of the runs, one after the other."""
    starts = _starts(counts)
    return np.repeat(firsts - starts[:-1], counts) + np.arange(starts[-1])


def document_rows(records: Int64, lengths: Int64, capacity: int, packing: bool) -> RowPlan:
    """Rows of exactly `capacity` tokens cut from the documents laid end to end; the last row may be shorter.

    Nothing is dropped: a document that crosses a border goes on in the next row. Without `packing` each document begins
    a row of its own.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    total = int(ends[-1])
    if packing:
        row_starts = np.arange(0, total, capacity)
    else:
        pieces = -(-lengths // capacity)
        row_starts = np.repeat(starts, pieces) + capacity * (
            np.arange(pieces.sum()) - np.repeat(_starts(pieces)[:-1], pieces)
        )
    cuts = np.unique(np.concatenate([starts, row_starts]))
    owner = np.searchsorted(starts, cuts, side="right") - 1
    segments = np.stack([records[owner], cuts - starts[owner], np.diff(cuts, append=total)], axis=1)
    return RowPlan(segments, np.append(np.searchsorted(cuts, row_starts), len(cuts)).astype(np.int64))


def shuffle_rows(plan: RowPlan, generator: np.random.Generator, keep_last: bool) -> RowPlan:
    """The same rows in random order; `keep_last` leaves the last one, which may be short, at the end."""
    movable = len(plan) - keep_last
    order = np.concatenate([generator.permutation(movable), np.arange(movable, len(plan))])
    counts = np.diff(plan.rows)[order]
    rows = _starts(counts)
    within = np.arange(rows[-1]) - np.repeat(rows[:-1], counts)
    return RowPlan(plan.segments[np.repeat(plan.rows[:-1][order], counts) + within], rows)


def _starts(counts: Int64) -> Int64:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
