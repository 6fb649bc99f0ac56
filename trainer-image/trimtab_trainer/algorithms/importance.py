"""Correction for rollouts sampled by another program than the one that trains.

The sampler computes the same policy's log-probabilities with other kernels, perhaps another dtype, so it samples from
a slightly different policy. Weights by the ratio of the two make the gradient unbiased; cutting them at a cap bounds
their variance (Ionides 2008; as TIS, Yao et al. 2025). All of this holds for a sampler without top-p and top-k only.
"""

from __future__ import annotations

import math

import torch


def importance_weights(trainer_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, cap: float) -> torch.Tensor:
    """Weight of each token: min(pi_trainer / pi_rollout, cap), without a gradient. It ignores earlier tokens' ratios.

    Args:
        trainer_log_probs: of the sampled tokens, by the weights that sampled them, fp32, of any shape.
        rollout_log_probs: the sampler's, at the same temperature.
        cap: above 0; usually 2 or more.
    """
    log_ratio = (trainer_log_probs - rollout_log_probs).detach()
    return torch.exp(log_ratio.clamp(max=math.log(cap)))


def sequence_importance_weights(
    trainer_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """Weight of each episode: the product of its tokens' ratios, cut at the cap, without a gradient.

    The product, exp of the sum, is the ratio of the episodes' probabilities, so it is unbiased below the cap. The
    geometric mean, exp of the mean, is not, and hides a token that the sampler could not have drawn.

    Args:
        trainer_log_probs: fp32 [R, T].
        rollout_log_probs: fp32 [R, T].
        mask: bool [R, T]; the tokens that the sampler drew.
        cap: above 0.

    Returns:
        fp32 [R].
    """
    log_ratio = torch.where(mask, trainer_log_probs - rollout_log_probs, 0).detach().sum(dim=1)
    return torch.exp(log_ratio.clamp(max=math.log(cap)))
