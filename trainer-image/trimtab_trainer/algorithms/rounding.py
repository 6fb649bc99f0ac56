"""How far rounding may part two programs that compute the same log-probabilities from the same weights."""

from __future__ import annotations

import math

import torch

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding to nearest."""
LIMIT = 3.0
"""Root mean squares beyond so many deviations are no rounding; see `log_prob_variance` for what it leaves out."""


def log_prob_variance(
    log_probs: torch.Tensor, entropies: torch.Tensor, vocabulary: int, dtype: torch.dtype, layers: int, width: int
) -> torch.Tensor:
    """Expected square of the difference of each token's log-probability between two programs, in nats squared.

    - One operation has a relative error e, e^2 = u^2 + width u32^2: its result is rounded to the dtype (u), and its
      sum over `width` terms is accumulated in fp32 (u32), as both programs do, in an order of their own.
    - The residual stream takes two such results a layer, and the last norm one: 2 layers + 1 independent errors, so
      the state before the head is off by e sqrt(2 layers + 1) of its length, in any direction. A logit is a product
      with that state, so it is off by that share of the logits' deviation s, not of its own size.
    - The head's own operation is off by e of the logit l, and so is the log-probability that is made of it.
    - log p = l - sum p l' takes two logits, and each of the two programs has errors of its own: four times.

    Nobody holds the logits, so s and l come from what is known: V normal logits of deviation s and mean 0 have the
    entropy H = log V - s^2 / 2, and the logarithm of their sum of exponentials is log V + s^2 / 2.

    Errors of activations and attention within a layer are left out, as is that they grow on their way; against them
    stands that the worst rounding is counted for the typical one, whose square is a third. Hence `LIMIT` deviations.

    Args:
        log_probs: of the sampled tokens, at the temperature of sampling, fp32 [N].
        entropies: of the distributions that they are of, H, fp32 [N].
        vocabulary: V.
        dtype: of weights and activations.
        layers: of the model.
        width: the longest sum: the size of the hidden states, or of those inside a layer.

    Returns:
        fp32 [N].
    """
    error = UNIT_ROUNDOFF[dtype] ** 2 + width * UNIT_ROUNDOFF[torch.float32] ** 2
    half_square = (math.log(vocabulary) - entropies).clamp(min=0)
    logits = log_probs + math.log(vocabulary) + half_square
    return 4 * error * ((2 * layers + 1) * 2 * half_square + logits.square() + log_probs.square())
