"""Examples-proportional mixing, against closed forms."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.data.mixture import Stream, epoch_generator, hold_out, quotas, replay, replay_targets


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


def test_the_mixture_draws_at_its_rates() -> None:
    """FLAN's own example: 100, 3000 and a million examples with a cap of 3000 are drawn as 100 : 3000 : 3000."""
    sizes, epochs = [100, 3000, 10**6], 2
    quota = quotas(sizes, [1, 1, 1], [3000] * 3)
    streams = [Stream(np.arange(size) + i * 10**7, 1, 5, i) for i, size in enumerate(sizes)]
    drawn = np.concatenate(
        [
            epoch_generator(5, epoch).permutation(
                np.concatenate([s.take(epoch * n, (epoch + 1) * n) for s, n in zip(streams, quota, strict=True)])
            )
            for epoch in range(epochs)
        ]
    )
    rates = np.array([100, 3000, 3000]) / 6100
    assert np.bincount(drawn // 10**7).tolist() == [200, 6000, 6000]
    # Any stretch of the shuffled stream has the rates, too. chi-square with 2 degrees of freedom exceeds 13.8 in 0.1 %.
    for part in np.array_split(drawn // 10**7, 10):
        expected = rates * len(part)
        assert float(((np.bincount(part, minlength=3) - expected) ** 2 / expected).sum()) < 13.8


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 5), st.integers(0, 9))
def test_nothing_repeats_within_a_pass(size: int, quota: int, epochs: int, seed: int) -> None:
    source = Stream(np.arange(size), 1, seed, 0)
    stream = np.concatenate([source.take(epoch * quota, (epoch + 1) * quota) for epoch in range(epochs + 1)])
    for first in range(0, len(stream), size):
        part = stream[first : first + size]
        assert len(set(part.tolist())) == len(part)
        assert set(part.tolist()) <= set(range(size))


def test_a_capped_set_is_seen_whole_before_it_repeats() -> None:
    source = Stream(np.arange(30), 1, 1, 0)
    seen = Counter(np.concatenate([source.take(epoch * 10, (epoch + 1) * 10) for epoch in range(3)]).tolist())
    assert seen == Counter(range(30))


def test_passes_are_reshuffled_and_repeatable() -> None:
    source = Stream(np.arange(50), 1, 7, 0)
    first, second = source.take(0, 50).tolist(), source.take(50, 100).tolist()
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first == Stream(np.arange(50), 1, 7, 0).take(0, 50).tolist()
    assert first != Stream(np.arange(50), 1, 8, 0).take(0, 50).tolist()
    assert first != Stream(np.arange(50), 1, 7, 1).take(0, 50).tolist()


def test_each_pass_takes_the_next_wording_of_every_record() -> None:
    source = Stream(np.arange(0, 30, 3), 3, 1, 0)
    passes = [source.take(i * 10, (i + 1) * 10).tolist() for i in range(4)]
    for number, found in enumerate(passes):
        assert sorted(found) == [record + number % 3 for record in range(0, 30, 3)]
    assert sorted(passes[0] + passes[1] + passes[2]) == list(range(30))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.floats(0.001, 0.9),
    st.integers(1, 3000),
    st.integers(0, 70),
)
def test_replay_is_an_exact_fraction_to_one_record(costs: list[int], fraction: float, rest: int, start: int) -> None:
    loss_tokens = np.array(costs)
    stream = Stream(np.arange(len(costs)), 1, 3, 0)
    (target,) = replay_targets([fraction], rest)
    taken = replay(stream, start, target, loss_tokens)
    found = int(loss_tokens[taken].sum())
    assert abs(float(target) / (float(target) + rest) - fraction) < 1e-9
    following = stream.take(start, start + len(taken) + 1)
    assert following[:-1].tolist() == taken.tolist(), "the stream goes on where it stopped"
    fewer = found - (int(loss_tokens[taken[-1]]) if len(taken) else 0)
    more = found + int(loss_tokens[following[-1]])
    assert abs(found - target) <= min(abs(fewer - target), abs(more - target)), "no other number of records is nearer"


def test_replay_fractions_are_of_the_whole() -> None:
    assert [float(target) for target in replay_targets([0.25, 0.25], 100)] == [50, 50]
    assert replay_targets([], 100) == []


def test_hold_out_splits_without_overlap() -> None:
    kept, held = hold_out(100, 0.1, 3, 0)
    assert len(held) == 10
    assert sorted([*kept, *held]) == list(range(100))


def test_examples_are_not_held_out() -> None:
    examples = np.zeros(100, dtype=np.bool_)
    examples[::2] = True
    _, held = hold_out(100, 0.5, 3, 0, examples)
    assert held.tolist() == list(range(1, 100, 2))
