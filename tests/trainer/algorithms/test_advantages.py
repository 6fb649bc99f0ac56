"""Advantages, whitening and explained variance: vectors, and invariance to ranks and to padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.algorithms.advantages import explained_variance, gae, moments, variance, whiten

WHOLE = torch.ones(1, 3, dtype=torch.bool)
REWARDS = torch.tensor([[-0.002, -0.004, 1.994]])
VALUES = torch.tensor([[0.1, 0.2, 0.3]])


def episodes(seed: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [R, T], and a mask of each row's first actions, one at least."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return torch.randn(rows, width, generator=generator) * 3 + 5, torch.arange(width) < lengths


def test_p5_advantages_and_returns() -> None:
    advantages, returns = gae(REWARDS, VALUES, WHOLE, discount=1.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[1.718035, 1.7053, 1.694]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[1.818035, 1.9053, 1.994]]), atol=1e-6, rtol=0)


def test_p5_padding_changes_nothing_whatever_lies_there() -> None:
    pad = (0, 2)
    padded = [torch.nn.functional.pad(each, pad, value=math.nan) for each in (REWARDS, VALUES)]
    mask = torch.nn.functional.pad(WHOLE, pad)
    for found, expected in zip(gae(*padded, mask, 0.9, 0.95), gae(REWARDS, VALUES, WHOLE, 0.9, 0.95), strict=True):
        assert torch.equal(found, torch.nn.functional.pad(expected, pad))


@given(st.integers(0, 2**16), st.floats(0.5, 1), st.floats(0, 1))
def test_p5_advantages_are_the_discounted_sum_of_temporal_differences(seed: int, discount: float, lam: float) -> None:
    rewards, mask = episodes(seed, 3, 6)
    values, _ = episodes(seed + 1, 3, 6)
    advantages, _ = gae(rewards, values, mask, discount, lam)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        r, v = rewards[row, :length].double().numpy(), np.append(values[row, :length].double().numpy(), 0)
        deltas = r + discount * v[1:] - v[:-1]
        expected = [sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        assert advantages[row, :length].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert not advantages[row, length:].any()


def test_p5_with_lambda_one_the_return_is_the_sum_of_the_rewards_to_come() -> None:
    rewards, mask = episodes(1, 4, 8)
    _, returns = gae(rewards, torch.randn(4, 8), mask, discount=1.0, gae_lambda=1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 2**16), st.integers(1, 4))
def test_p6_ranks_that_add_their_moments_whiten_as_one(seed: int, cut: int) -> None:
    values, mask = episodes(seed, 5, 7)
    alone = whiten(values, mask, moments(values, mask))
    total = moments(values[:cut], mask[:cut]) + moments(values[cut:], mask[cut:])
    ranks = torch.cat([whiten(values[part], mask[part], total) for part in (slice(0, cut), slice(cut, 5))])
    torch.testing.assert_close(ranks, alone, atol=1e-6, rtol=1e-6)
    per_rank = torch.cat(
        [whiten(values[p], mask[p], moments(values[p], mask[p])) for p in (slice(0, cut), slice(cut, 5))]
    )
    assert not torch.allclose(per_rank, alone, atol=1e-3), "each rank by its own moments is another result"


def test_p6_whitened_values_have_mean_0_and_biased_variance_1_and_nothing_outside_the_mask() -> None:
    values, mask = episodes(2, 6, 9)
    spoilt = torch.where(mask, values, math.nan)
    found = whiten(spoilt, mask, moments(spoilt, mask))
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found[mask].var(correction=0)) == pytest.approx(1, rel=1e-5)
    assert not found[~mask].any()
    assert found.dtype == torch.float32


def test_p6_a_mean_far_from_zero_costs_no_digits() -> None:
    values, mask = episodes(3, 6, 9)
    far = (values * 128).round() / 128 + 4096
    expected = whiten(far - 4096, mask, moments(far - 4096, mask))
    torch.testing.assert_close(whiten(far, mask, moments(far, mask)), expected, atol=1e-6, rtol=1e-6)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 5000))
def test_p6_equal_values_have_no_variance_and_whiten_to_zero(value: float, count: int) -> None:
    values, mask = torch.full((1, count), value), torch.ones(1, count, dtype=torch.bool)
    assert float(variance(moments(values, mask))) == 0
    assert whiten(values, mask, moments(values, mask)).tolist() == [[pytest.approx(0, abs=1e-5)] * count]


def test_explained_variance() -> None:
    returns, mask = episodes(4, 6, 9)
    noise = torch.randn(6, 9)

    def explained(values: torch.Tensor) -> float:
        return explained_variance(moments(returns, mask), moments(returns - values, mask))

    assert explained(returns) == 1.0
    assert explained(torch.full((6, 9), 3.0)) == pytest.approx(0, abs=1e-6)
    wrong = (noise[mask].var() / returns[mask].var()).item()
    assert explained(returns + noise) == pytest.approx(1 - wrong, rel=1e-4)
    constant = torch.full((6, 9), 0.1)
    assert explained_variance(moments(constant, mask), moments(constant - noise, mask)) == 0.0
