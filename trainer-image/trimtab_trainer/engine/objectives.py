"""What a stage minimises: a sum over units (tokens, pairs), divided by their number in the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from trimtab_trainer.algorithms.causal_lm import segment_log_probs, token_loss_sum
from trimtab_trainer.algorithms.preference import preference_losses
from trimtab_trainer.data.store import PlanName, PreparedData
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.settings import Preference


@dataclass(frozen=True)
class Sums:
    """Sums over the units of a micro-batch."""

    loss: torch.Tensor
    """fp32 scalar, with its gradient."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Scalars without gradient, one for each of the objective's `metrics`."""


class Objective(Protocol):
    """One stage type's loss."""

    metrics: tuple[str, ...]
    """Further means, in Prometheus' spelling."""

    def units(self, prepared: PreparedData, plan: PlanName, start: int, stop: int) -> int:
        """Units of the rows [start, stop) of a plan."""

    def sums(self, logits: torch.Tensor, batch: MicroBatch) -> Sums:
        """Of one micro-batch; `logits`: [R, T, V]. It may have no rows: sums of 0 then, with gradients of zeros."""


class NextToken:
    """Mean negative log-likelihood of the loss-bearing tokens."""

    metrics: tuple[str, ...] = ()

    def units(self, prepared: PreparedData, plan: PlanName, start: int, stop: int) -> int:
        """Loss-bearing tokens."""
        return prepared.loss_tokens(plan, start, stop)

    def sums(self, logits: torch.Tensor, batch: MicroBatch) -> Sums:
        """See `Objective.sums`."""
        return Sums(token_loss_sum(logits, batch.input_ids, batch.loss_mask))


Forward = Callable[[MicroBatch], torch.Tensor]
"""Logits [R, T, V] of a micro-batch."""


class Pairwise:
    """Preference optimisation on pairs: a row's segments are chosen, rejected, chosen, rejected, and so on."""

    metrics: tuple[str, ...] = ("rewards_chosen", "rewards_rejected", "rewards_margin", "accuracy")

    def __init__(self, reference: Forward, settings: Preference) -> None:
        """`reference`: the starting weights, with dropout off."""
        self._reference = reference
        self._settings = settings

    def units(self, prepared: PreparedData, plan: PlanName, start: int, stop: int) -> int:
        """Pairs: each counts the same, whatever its length and whoever has it."""
        return prepared.segments(plan, start, stop) // 2

    def sums(self, logits: torch.Tensor, batch: MicroBatch) -> Sums:
        """See `Objective.sums`. A reward is beta times the log-ratio to the reference (Rafailov et al. 2023, § 4)."""
        with torch.no_grad():
            reference = self._log_probs(self._reference(batch), batch)
        chosen, rejected = (self._log_probs(logits, batch) - reference).view(-1, 2).unbind(dim=1)
        rewards = [self._settings.beta * ratios.detach() for ratios in (chosen, rejected)]
        margins = rewards[0] - rewards[1]
        right = (margins > 0).float() + 0.5 * (margins == 0)
        values = (*rewards, margins, right)
        losses = preference_losses(chosen - rejected, self._settings)
        return Sums(losses.sum(), {name: value.sum() for name, value in zip(self.metrics, values, strict=True)})

    def _log_probs(self, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return segment_log_probs(logits, batch.input_ids, batch.loss_mask, batch.loss_tokens)
