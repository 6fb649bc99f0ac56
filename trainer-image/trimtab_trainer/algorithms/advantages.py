"""Advantages, and statistics of them over the tokens of all ranks.

A mask, bool, marks what counts; in [R, T] the actions of an episode are contiguous from column 0.
"""

from __future__ import annotations

import torch

RESOLUTION = 1e-14
"""Of a variance, relative to the squared mean: fp32 values tell no smaller one, and fp64 sums are exact beyond it."""
EPSILON = 1e-8
"""Added to the variance that whitening divides by."""


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, discount: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), without a gradient.

    A_t = delta_t + gamma lambda A_(t+1), with delta_t = r_t + gamma V_(t+1) - V_t. An episode ends with its last
    action, cut at the token limit or not: V and A are 0 after it.

    Args:
        rewards: fp32 [R, T].
        values: V of the state before each action, fp32 [R, T].
        mask: bool [R, T].
        discount: gamma.
        gae_lambda: lambda.

    Returns:
        Advantages A and returns A + V, fp32 [R, T]; 0 outside the mask, whatever lies there.
    """
    rewards, values = (torch.where(mask, each.detach(), 0) for each in (rewards, values))
    advantages = torch.zeros_like(rewards)
    after = value_after = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        after = rewards[:, t] + discount * value_after - values[:, t] + discount * gae_lambda * after
        value_after = values[:, t]
        advantages[:, t] = after
    return advantages, advantages + values


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of the values in the mask: fp64 [3], so that one all-reduce adds up the ranks."""
    kept = values.detach()[mask].double()
    return torch.stack([kept.new_tensor(kept.numel()), kept.sum(), kept.square().sum()])


def variance(moments: torch.Tensor) -> torch.Tensor:
    """Biased variance, fp64 scalar; exactly 0 where the values are equal, and for none."""
    count, total, squares = moments
    mean, mean_square = total / count.clamp(min=1), squares / count.clamp(min=1)
    found = mean_square - mean.square()
    return torch.where(found > RESOLUTION * mean_square, found, 0)


def whiten(values: torch.Tensor, mask: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Values shifted to mean 0 and scaled to variance 1 over what `moments` counts; 0 outside the mask.

    Every rank passes the summed moments of all, so the same advantages come out at any number of ranks. The variance is
    the biased one, as in the code of Ziegler et al. 2019: exactly 1 over the batch afterwards, and defined for one
    token. (PyTorch's unbiased default, in some other implementations, gives values smaller by sqrt((N - 1) / N).)

    Args:
        values: fp32, of any shape.
        mask: bool, of the same shape.
        moments: see `moments`; summed over all ranks.
    """
    count, total, _ = moments
    whitened = (values.double() - total / count.clamp(min=1)) * torch.rsqrt(variance(moments) + EPSILON)
    return torch.where(mask, whitened, 0).to(values.dtype)


def explained_variance(returns: torch.Tensor, errors: torch.Tensor) -> float:
    """Share of the returns' variance that the critic explains: 1 - Var(returns - values) / Var(returns).

    1 is perfect, 0 is as good as a constant, below 0 is worse. Returns that do not vary leave nothing to explain: 0.

    Args:
        returns: `moments` of the returns, summed over all ranks.
        errors: `moments` of returns - values.
    """
    whole = variance(returns)
    return float(1 - variance(errors) / whole) if whole > 0 else 0.0
