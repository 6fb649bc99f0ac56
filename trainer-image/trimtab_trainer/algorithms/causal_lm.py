"""Next-token loss."""

from __future__ import annotations

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
    bears_loss = loss_mask[:, 1:]
    predictions = logits[:, :-1][bears_loss].float()
    return cross_entropy(predictions, input_ids[:, 1:][bears_loss], reduction="sum")
