"""Examples-proportional mixing with a cap, and replay: how much of each data set an epoch takes, and which records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from trimtab_trainer.data.store import Int64

# First word of each random stream's key, so that no two streams are alike.
_PASS, _EPOCH, _HOLD_OUT = 1, 2, 3
TEMPLATE_STREAM, EXAMPLES_STREAM, POOL_STREAM = 4, 5, 6


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


@dataclass(frozen=True)
class Stream:
    """A data set as an endless stream of passes, each a fresh permutation of all its records.

    So nothing repeats within a pass, and a capped data set is seen whole before anything of it is seen twice.

    Attributes:
        records: id of each record's first text, int64 [n].
        wordings: texts of each record, with consecutive ids; pass p takes the one with number p modulo `wordings`.
        seed: of the stage.
        source: number of the data set, so that no two have the same permutations.
    """

    records: Int64
    wordings: int
    seed: int
    source: int

    def passes(self, start: int) -> Iterator[Int64]:
        """Text ids from position `start` on, pass by pass, without end."""
        number, first = divmod(start, len(self.records))
        while True:
            order = np.random.default_rng([_PASS, self.seed, self.source, number]).permutation(len(self.records))
            yield self.records[order[first:]] + number % self.wordings
            number, first = number + 1, 0

    def take(self, start: int, stop: int) -> Int64:
        """Text ids of the positions [start, stop)."""
        parts = [np.empty(0, dtype=np.int64)]
        if start < stop:
            for part in self.passes(start):
                parts.append(part[: stop - start])
                start += len(parts[-1])
                if start == stop:
                    break
        return np.concatenate(parts)


def replay_targets(fractions: Sequence[float], tokens: int) -> list[Fraction]:
    """Loss-bearing tokens of each replayed data set beside `tokens` of all other ones.

    With f_i the fractions of the whole and F their sum, below 1: f_i / (1 - F) * tokens.
    """
    exact = [Fraction(fraction) for fraction in fractions]
    return [fraction / (1 - sum(exact)) * tokens for fraction in exact]


def replay(stream: Stream, start: int, target: Fraction, loss_tokens: Int64) -> Int64:
    """Text ids from position `start` on whose loss-bearing tokens come nearest to `target`; a tie takes fewer.

    Args:
        stream: the replayed data set.
        start: how many of its positions earlier epochs took.
        target: loss-bearing tokens to come near to; off by at most half of the last record's.
        loss_tokens: of each text, int64, all positive for those of the stream.
    """
    parts, before = [np.empty(0, dtype=np.int64)], 0
    for part in stream.passes(start):
        sums = before + np.cumsum(loss_tokens[part])
        reached = int(np.searchsorted(sums, float(target)))
        if reached < len(part):
            below = int(sums[reached - 1]) if reached else before
            parts.append(part[: reached + (int(sums[reached]) - target < target - below)])
            break
        parts.append(part)
        before = int(sums[-1])
    return np.concatenate(parts)


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """The generator of everything that an epoch shuffles."""
    return np.random.default_rng([_EPOCH, seed, epoch])


def hold_out(
    size: int, fraction: float, seed: int, source: int, kept: NDArray[np.bool_] | None = None
) -> tuple[Int64, Int64]:
    """Split the examples of one data set: (kept, held out), both ascending; `round(size * fraction)` are held out.

    `kept`: bool [size], examples to hold out only when there are no others.
    """
    order = np.random.default_rng([_HOLD_OUT, seed, source]).permutation(size)
    if kept is not None:
        order = order[np.argsort(kept[order], kind="stable")]
    count = round(size * fraction)
    return np.sort(order[count:]), np.sort(order[:count])


def sample(size: int, cap: int | None, seed: int, source: int) -> Int64:
    """At most `cap` of `size` examples, ascending: the same ones whatever else there is."""
    return np.sort(np.random.default_rng([_HOLD_OUT, seed, source]).permutation(size)[:cap])
