"""Losses of reward models, on pairs and on rankings, and where a segment's score is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import logsigmoid


def pool_last(values: torch.Tensor, segment_lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """What lies at the last token of each segment, row by row.

    Where a segment ends is known from its length. Looking for the padding token instead would stop at an end token
    that doubles as padding, and needs a padding token.

    Args:
        values: scores [R, T], or hidden states [R, T, H]. Rows hold their segments from column 0; then comes padding.
        segment_lengths: tokens of each segment of each of the R rows; S segments in all.

    Returns:
        [S] or [S, H].
    """
    width = values.shape[1]
    last = [row * width + end - 1 for row, lengths in enumerate(segment_lengths) for end in accumulate(lengths)]
    return values.flatten(0, 1)[torch.tensor(last, dtype=torch.long, device=values.device)]


def comparison_losses(differences: torch.Tensor, margins: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """-p log sigmoid(d - m) - (1 - p) log sigmoid(m - d) of each comparison (Bradley and Terry 1952).

    The margin m asks for more than d > 0 (Touvron et al. 2023, Llama 2, equation 2). The label is soft where the judge
    gives a probability (Bai et al. 2022, Constitutional AI).

    Args:
        differences: d = score(chosen) - score(rejected), fp32 [C].
        margins: m, fp32 [C]; 0 for none.
        probabilities: p that the chosen answer is the better one, fp32 [C]; 1 for a hard label.

    Returns:
        fp32 [C].
    """
    beyond = differences - margins
    return -probabilities * logsigmoid(beyond) - (1 - probabilities) * logsigmoid(-beyond)


@dataclass(frozen=True)
class RankingTerms:
    """Of each of G prompts: means over its comparisons, 0 for a prompt without any."""

    losses: torch.Tensor
    """fp32 [G], with its gradient."""
    accuracies: torch.Tensor
    """Share of comparisons in which the better answer has the higher score; equal scores count one half."""
    margins: torch.Tensor
    """Score of the better answer less that of the other."""
    confidences: torch.Tensor
    """Probability that the model gives to its own verdict: sigmoid(|difference|). Calibrated, it is the accuracy."""


def ranking_losses(scores: torch.Tensor, ranks: torch.Tensor, groups: Sequence[int]) -> RankingTerms:
    """-log sigmoid(score of the better - score of the worse), over all pairs of a prompt's K answers.

    Ouyang et al. 2022, equation 1: each answer is scored once, and a prompt counts the same whatever its K, as the mean
    over its comparisons. Answers of equal rank are not compared.

    Args:
        scores: fp32 [S], prompt by prompt.
        ranks: [S]; the best answer of a prompt has the lowest.
        groups: K of each of the G prompts; they sum to S.
    """
    most = max(groups, default=0)
    starts = [end - size for end, size in zip(accumulate(groups), groups, strict=True)]
    device = scores.device
    sizes = torch.tensor(groups, dtype=torch.long, device=device)[:, None]
    offsets = torch.arange(most, device=device)[None, :]
    there = offsets < sizes
    # A place beyond a prompt's K repeats its first answer, and counts in no comparison.
    at = torch.tensor(starts, dtype=torch.long, device=device)[:, None] + torch.where(there, offsets, 0)
    score, rank = scores[at], ranks[at]
    compared = (rank[:, :, None] < rank[:, None, :]) & there[:, :, None] & there[:, None, :]
    count = compared.sum(dim=(1, 2)).clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(compared, values, 0).sum(dim=(1, 2)) / count

    differences = score[:, :, None] - score[:, None, :]
    losses = mean(-logsigmoid(differences))
    found = differences.detach()
    right = (found > 0).float() + 0.5 * (found == 0)
    return RankingTerms(losses, mean(right), mean(found), mean(found.abs().sigmoid()))
