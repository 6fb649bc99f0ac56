"""Log-probabilities of tokens, and the next-token loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy


def token_loss_sum(logits: torch.Tensor, input_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(token t | tokens before t) over the loss-bearing tokens, in nats; divide it by their global number.

    A mean over a micro-batch would weigh tokens by the luck of their neighbours (transformers issue 34191).

    Args:
        logits: [R, T, V]; position t predicts token t + 1.
        input_ids: int64 [R, T].
        loss_mask: bool [R, T]; token t bears loss as a target. The first token of a row never does.

    Returns:
        fp32 scalar; 0, with a gradient of zeros, where no token bears loss.
    """
    return cross_entropy(*targets(logits, input_ids, loss_mask), reduction="sum")


def segment_log_probs(
    logits: torch.Tensor, input_ids: torch.Tensor, loss_mask: torch.Tensor, loss_tokens: Sequence[int]
) -> torch.Tensor:
    """Log p(answer | prompt) of each segment: the sum, not the mean, over its loss-bearing tokens, in nats.

    Args:
        logits: [R, T, V]; position t predicts token t + 1.
        input_ids: int64 [R, T].
        loss_mask: bool [R, T].
        loss_tokens: loss-bearing tokens of each of the S segments, row by row; they sum to those of the mask.

    Returns:
        fp32 [S]; where S = 0 it still has a gradient, of zeros.
    """
    log_probs = -cross_entropy(*targets(logits, input_ids, loss_mask), reduction="none")
    # Not index_add: on a GPU its order of summation, and with it the last bits, differ from run to run.
    sums = [part.sum() for part in log_probs.split(list(loss_tokens))]
    return torch.stack(sums) if sums else log_probs


def targets(
    logits: torch.Tensor, input_ids: torch.Tensor, loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions, fp32 [N, V], and tokens, int64 [N], of the N loss-bearing tokens."""
    bears_loss = loss_mask[:, 1:]
    return logits[:, :-1][bears_loss].float(), input_ids[:, 1:][bears_loss]
