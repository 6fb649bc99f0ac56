"""Examples-proportional mixing with a cap: how many examples of each data set an epoch takes, and which ones."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from trimtab_trainer.data.store import Int64

# First word of each random stream's key, so that no two streams are alike.
_PASS, _EPOCH, _HOLD_OUT = 1, 2, 3


def quotas(sizes: Sequence[int], weights: Sequence[float], caps: Sequence[int | None]) -> list[int]:
    """Examples of each data set in one epoch.

    With counted_i = min(n_i, cap_i), an epoch holds E = sum_i counted_i examples, of which data set i gets the share
    weight_i * counted_i / sum_j weight_j * counted_j. Shares become integers by largest remainder, ties to the earlier
    data set, so they sum to E exactly (Raffel et al. 2020, section 3.5.2, with the weights added).
    """
    counted = [size if cap is None else min(size, cap) for size, cap in zip(sizes, caps, strict=True)]
    rates = [Fraction(weight) * count for weight, count in zip(weights, counted, strict=True)]
    total, scale = sum(counted), sum(rates)
    if not scale:
        return [0] * len(counted)
    exact = [total * rate / scale for rate in rates]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def draw(size: int, quota: int, seed: int, epoch: int, source: int) -> Int64:
    """Which of a data set's `size` examples an epoch takes: int64 [quota], values below `size`.

    The data set is an endless stream of passes, each a fresh permutation of all its examples; epoch e takes the
    positions [e * quota, (e + 1) * quota). So nothing repeats within a pass, and a capped data set is seen whole before
    anything of it is seen twice.
    """
    parts = [np.empty(0, dtype=np.int64)]
    position, stop = epoch * quota, (epoch + 1) * quota
    while position < stop:
        number, first = divmod(position, size)
        last = min(size, first + stop - position)
        parts.append(np.random.default_rng([_PASS, seed, source, number]).permutation(size)[first:last])
        position += last - first
    return np.concatenate(parts)


def epoch_records(sources: Sequence[Int64], quota: Sequence[int], seed: int, epoch: int) -> Int64:
    """Record ids of one epoch in training order: the draws of all data sets, shuffled together by (seed, epoch)."""
    drawn = [
        records[draw(len(records), count, seed, epoch, i)]
        for i, (records, count) in enumerate(zip(sources, quota, strict=True))
    ]
    return epoch_generator(seed, epoch).permutation(np.concatenate(drawn))


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """The generator of everything that an epoch shuffles."""
    return np.random.default_rng([_EPOCH, seed, epoch])


def hold_out(size: int, fraction: float, seed: int, source: int) -> tuple[Int64, Int64]:
    """Split the examples of one data set: (kept, held out), both ascending; `round(size * fraction)` are held out."""
    order = np.random.default_rng([_HOLD_OUT, seed, source]).permutation(size)
    count = round(size * fraction)
    return np.sort(order[count:]), np.sort(order[:count])
