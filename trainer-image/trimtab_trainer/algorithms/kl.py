"""Distance between two policies, estimated from sampled tokens, and the controller of its penalty."""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST_EXPONENT = 20.0
"""Of k3: e^20 = 4.9e8 nats says enough, and sums of it stay finite in fp32."""
LARGEST_ERROR = 0.2
"""Of the controller, relative to its target (Ziegler et al. 2019, section 2.2)."""


class KLEstimates(NamedTuple):
    """Schulman's estimators (Approximating KL Divergence, 2020), each in nats and of the log-ratio's shape."""

    k1: torch.Tensor
    """Unbiased; negative for half of the tokens or so."""
    k2: torch.Tensor
    """Biased, of low variance, never negative."""
    k3: torch.Tensor
    """Unbiased and never negative."""


def kl_estimates(log_ratio: torch.Tensor) -> KLEstimates:
    """KL(pi || pi_ref) of tokens sampled from pi: k1 = l, k2 = l² / 2, k3 = e^-l - 1 + l.

    All three are for metrics. As a loss only k2 has the gradient of KL(pi || pi_ref): that of k1 is 0 in the mean, and
    k3's is the gradient of the reverse, KL(pi_ref || pi).

    Args:
        log_ratio: l = log pi(token) - log pi_ref(token), fp32, of any shape. Below -20, k3 takes e^20 for e^-l.
    """
    k3 = torch.expm1(torch.clamp(-log_ratio, max=LARGEST_EXPONENT)) + log_ratio
    return KLEstimates(log_ratio, log_ratio**2 / 2, k3)


def next_coefficient(coefficient: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The KL penalty's coefficient after `episodes` more episodes (Ziegler et al. 2019, section 2.2).

    beta · (1 + clip(kl / target - 1, -0.2, 0.2) · episodes / horizon).

    Args:
        coefficient: beta.
        kl: mean over these episodes, in nats a sequence.
        target: in nats a sequence, above 0.
        horizon: episodes in which beta changes by a factor of about e^0.2 at most.
        episodes: how many gave `kl`.
    """
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1 + error * episodes / horizon)
