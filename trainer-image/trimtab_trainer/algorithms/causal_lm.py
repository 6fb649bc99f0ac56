"""Log-probabilities of tokens, from logits that are in memory, and of whole answers.

`token_log_probs` does from hidden states what `logit_log_probs` does from logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy


def logit_log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of each token, its log-probability and the entropy of the distribution that it is of, both in nats.

    Args:
        logits: of the distributions, [N, V].
        tokens: int64 [N].
        temperature: what the logits are divided by.

    Returns:
        fp32 [2, N]: log-probabilities, which have a gradient, and entropies, which have none.
    """
    scaled = logits.float() / temperature
    return torch.stack([-cross_entropy(scaled, tokens, reduction="none"), entropy(scaled.detach())])


def segment_sums(log_probs: torch.Tensor, loss_tokens: Sequence[int]) -> torch.Tensor:
    """Log p(answer | prompt) of each segment: the sum, not the mean, over its loss-bearing tokens, in nats.

    Args:
        log_probs: of the N loss-bearing tokens, row by row, fp32 [N].
        loss_tokens: loss-bearing tokens of each of the S segments, row by row; they sum to N.

    Returns:
        fp32 [S]; where S = 0 it still has a gradient, of zeros.
    """
    # Not index_add: on a GPU its order of summation, and with it the last bits, differ from run to run.
    sums = [part.sum() for part in log_probs.split(list(loss_tokens))]
    return torch.stack(sums) if sums else log_probs


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each softmax distribution, in nats: fp32 [N] of logits [N, V]. A logit of -inf adds nothing."""
    log_probs = logits.float().log_softmax(dim=-1)
    # 0 · -inf is not a number.
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum(dim=-1)
