"""Examples-proportional mixing, against closed forms."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.data.mixture import draw, epoch_records, hold_out, quotas


def test_rates_are_proportional_to_capped_sizes() -> None:
    assert quotas([100, 3000, 10**6], [1, 1, 1], [3000] * 3) == [100, 3000, 3000]


def test_weights_share_out_the_same_epoch_by_largest_remainder() -> None:
    # E = 30; shares 3*10/45*30 = 20, 1*10/45*30 = 6.67, 0.5*10/45*30 = 3.33
    assert quotas([10, 10, 10], [3, 1, 0.5], [None, None, None]) == [20, 7, 3]


def test_equal_remainders_go_to_the_earlier_data_set() -> None:
    # E = 2, three equal shares of 2/3
    assert quotas([1, 1, 1], [1, 1, 1], [None] * 3) == [1, 1, 1]
    assert quotas([1, 1], [1, 3], [None] * 2) == [1, 1]  # 0.5 and 1.5


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.floats(0.01, 100), st.none() | st.integers(1, 400)), min_size=1, max_size=8
    )
)
def test_an_epoch_holds_the_sum_of_capped_sizes(sets: list[tuple[int, float, int | None]]) -> None:
    sizes, weights, caps = zip(*sets, strict=True)
    found = quotas(sizes, weights, caps)
    counted = [n if cap is None else min(n, cap) for n, cap in zip(sizes, caps, strict=True)]
    rates = np.array(weights) * counted
    exact = sum(counted) * rates / rates.sum()
    assert sum(found) == sum(counted)
    assert np.all(np.abs(np.array(found) - exact) < 1 + 1e-6)


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 5), st.integers(0, 9))
def test_nothing_repeats_within_a_pass(size: int, quota: int, epochs: int, seed: int) -> None:
    stream = np.concatenate([draw(size, quota, seed, epoch, 0) for epoch in range(epochs + 1)])
    for first in range(0, len(stream), size):
        part = stream[first : first + size]
        assert len(set(part.tolist())) == len(part)
        assert set(part.tolist()) <= set(range(size))


def test_a_capped_set_is_seen_whole_before_it_repeats() -> None:
    seen = Counter(np.concatenate([draw(30, 10, 1, epoch, 0) for epoch in range(3)]).tolist())
    assert seen == Counter(range(30))


def test_epochs_are_reshuffled_and_repeatable() -> None:
    sources = [np.arange(50), np.arange(50, 60)]
    first, second = (epoch_records(sources, [50, 10], 7, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(60))
    assert first.tolist() != second.tolist()
    assert first.tolist() == epoch_records(sources, [50, 10], 7, 0).tolist()
    assert first.tolist() != epoch_records(sources, [50, 10], 8, 0).tolist()


def test_hold_out_splits_without_overlap() -> None:
    kept, held = hold_out(100, 0.1, 3, 0)
    assert len(held) == 10
    assert sorted([*kept, *held]) == list(range(100))
