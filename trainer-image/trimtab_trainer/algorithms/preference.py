"""Losses on pairs of answers, by how far the model has moved from the reference on each."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from trimtab_trainer.settings import Preference, PreferenceLoss


def preference_losses(margins: torch.Tensor, settings: Preference) -> torch.Tensor:
    """Loss of each pair.

    With the log-ratio of an answer y, r(y) = log pi(y|x) - log pi_ref(y|x), summed over its tokens, and the margin
    m = r(chosen) - r(rejected):

    - sigmoid: -(1 - eps) log sigmoid(beta m) - eps log sigmoid(-beta m) (Rafailov et al. 2023, equation 7; with the
      label smoothing eps of conservative DPO, Mitchell 2023),
    - ipo: (m - 1 / (2 beta))^2 (Azar et al. 2023, equation 17, whose tau is beta here). The log-ratios are sums, as
      there; some implementations divide them by the length.

    Args:
        margins: m, fp32 [P], in nats.
        settings: loss, beta, and eps.

    Returns:
        fp32 [P]; ln 2, or 1 / (4 beta^2), for a model that is the reference.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.loss is PreferenceLoss.IPO:
        return (margins - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * logsigmoid(beta * margins) - smoothing * logsigmoid(-beta * margins)
