"""Rows: nothing lost, nothing too long, the same every time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.data.pack import best_fit_decreasing, document_rows, ranking_rows, record_rows, shuffle_rows
from trimtab_trainer.data.store import RowPlan

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=60)


def test_best_fit_decreasing_puts_each_item_where_least_room_is_left() -> None:
    # By hand, capacity 10: 7 | 6 | 4 joins the 6 (room 4 before 3) | 3 joins the 7 | 2 opens a bin | 1 joins the 2
    assert best_fit_decreasing(np.array([3, 7, 1, 6, 2, 4]), 10) == [[1, 0], [3, 5], [4, 2]]
    # the 3 would fit beside the 6 too, but fills the row of the 7
    assert best_fit_decreasing(np.array([7, 6, 3]), 10) == [[0, 2], [1]]


@given(LENGTHS, st.booleans())
def test_packed_rows_partition_the_records(lengths: list[int], packing: bool) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    records = np.arange(100, 100 + len(sizes))
    plan = record_rows(records, sizes, 20, packing)
    assert sorted(plan.segments[:, 0].tolist()) == records.tolist()
    rows = [plan.segments[a:b] for a, b in zip(plan.rows[:-1], plan.rows[1:], strict=True)]
    assert all(0 < row[:, 2].sum() <= 20 for row in rows)
    assert packing or [len(row) for row in rows] == [1] * len(records)
    if packing:  # best fit: no two rows would fit into one
        loads = sorted(int(row[:, 2].sum()) for row in rows)
        assert len(loads) < 2 or loads[0] + loads[1] > 20


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=40), st.booleans())
def test_d6_pairs_stay_whole_and_in_order(lengths: list[tuple[int, int]], packing: bool) -> None:
    sizes = np.array([length for pair in lengths for length in pair], dtype=np.int64)
    plan = ranking_rows(np.arange(0, len(sizes), 2), np.full(len(lengths), 2), sizes, 20, packing)
    rows = [plan.segments[a:b] for a, b in zip(plan.rows[:-1], plan.rows[1:], strict=True)]
    pairs = [tuple(pair) for row in rows for pair in row[:, 0].reshape(-1, 2).tolist()]
    assert sorted(pairs) == [(i, i + 1) for i in range(0, len(sizes), 2)]
    assert [int(sizes[record]) for record in plan.segments[:, 0]] == plan.segments[:, 2].tolist()
    assert all(row[:, 2].sum() <= 40 for row in rows)
    assert packing or [len(row) for row in rows] == [2] * len(lengths)


@given(st.lists(st.lists(st.integers(1, 20), min_size=2, max_size=5), min_size=1, max_size=30), st.booleans())
def test_rankings_stay_whole_and_in_order(rankings: list[list[int]], packing: bool) -> None:
    sizes = np.array([length for ranking in rankings for length in ranking], dtype=np.int64)
    counts = np.array([len(ranking) for ranking in rankings])
    firsts = np.cumsum(counts) - counts
    plan = ranking_rows(firsts, counts, sizes, 20, packing)
    answers = dict(zip(firsts.tolist(), counts.tolist(), strict=True))
    found = []
    for first, stop in zip(plan.rows[:-1].tolist(), plan.rows[1:].tolist(), strict=True):
        assert plan.segments[first:stop, 2].sum() <= 20 * max(answers.values())
        while first < stop:  # a row begins with a ranking's first answer, and ends with a ranking's last one
            record = int(plan.segments[first, 0])
            texts = plan.segments[first : first + answers[record]]
            assert texts[:, 0].tolist() == list(range(record, record + answers[record]))
            assert texts[:, 2].tolist() == sizes[texts[:, 0]].tolist()
            found.append(record)
            first += answers[record]
        assert first == stop
    assert sorted(found) == firsts.tolist()


@given(LENGTHS, st.integers(1, 9))
def test_document_rows_cut_the_concatenation(lengths: list[int], capacity: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    plan = document_rows(np.arange(len(sizes)), sizes, capacity, True)
    assert _tokens(plan) == [(record, i) for record, size in enumerate(lengths) for i in range(size)]
    widths = [int(plan.segments[a:b, 2].sum()) for a, b in zip(plan.rows[:-1], plan.rows[1:], strict=True)]
    assert widths[:-1] == [capacity] * (len(widths) - 1)
    assert 0 < widths[-1] <= capacity


@given(LENGTHS, st.integers(1, 9))
def test_unpacked_documents_begin_rows_of_their_own(lengths: list[int], capacity: int) -> None:
    plan = document_rows(np.arange(len(lengths)), np.array(lengths, dtype=np.int64), capacity, False)
    assert _tokens(plan) == [(record, i) for record, size in enumerate(lengths) for i in range(size)]
    assert np.all(np.diff(plan.rows) == 1)
    assert np.all(plan.segments[:, 1] % capacity == 0)


@given(LENGTHS, st.booleans())
def test_shuffling_moves_whole_rows(lengths: list[int], keep_last: bool) -> None:
    plan = document_rows(np.arange(len(lengths)), np.array(lengths, dtype=np.int64), 7, True)
    moved = shuffle_rows(plan, np.random.default_rng(1), keep_last)
    assert sorted(_rows(moved)) == sorted(_rows(plan))
    assert not keep_last or _rows(moved)[-1] == _rows(plan)[-1]
    assert _rows(moved) == _rows(shuffle_rows(plan, np.random.default_rng(1), keep_last))


def _rows(plan: RowPlan) -> list[list[list[int]]]:
    return [plan.segments[a:b].tolist() for a, b in zip(plan.rows[:-1], plan.rows[1:], strict=True)]


def _tokens(plan: RowPlan) -> list[tuple[int, int]]:
    return [(record, start + i) for record, start, size in plan.segments.tolist() for i in range(size)]
