"""What a stage minimises: a sum over units (tokens, pairs), divided by their number in the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch

from trimtab_trainer.algorithms.causal_lm import segment_sums
from trimtab_trainer.algorithms.preference import preference_losses
from trimtab_trainer.algorithms.reward import comparison_losses, pool_last, ranking_losses
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

    def sums(self, outputs: torch.Tensor, batch: MicroBatch) -> Sums:
        """Of one micro-batch and what the network answers for it.

        It may have no rows: sums of 0 then, with gradients of zeros.
        """


class NextToken:
    """Mean negative log-likelihood of the loss-bearing tokens."""

    metrics: tuple[str, ...] = ()

    def units(self, prepared: PreparedData, plan: PlanName, start: int, stop: int) -> int:
        """Loss-bearing tokens."""
        return prepared.loss_tokens(plan, start, stop)

    def sums(self, outputs: torch.Tensor, batch: MicroBatch) -> Sums:
        """See `Objective.sums`; `outputs`: of a `LanguageModel`.

        A mean over a micro-batch would weigh tokens by the luck of their neighbours (transformers issue 34191).
        """
        log_probs, _ = outputs
        return Sums(-log_probs.sum())


Forward = Callable[[MicroBatch], torch.Tensor]
"""What a network answers for a micro-batch."""


class Ranked:
    """A reward model's loss on compared answers: each is scored once, by its last token."""

    metrics: tuple[str, ...] = ("accuracy", "margin", "confidence")

    def units(self, prepared: PreparedData, plan: PlanName, start: int, stop: int) -> int:
        """Prompts: each counts the same, whatever the number of its answers."""
        return prepared.rankings(plan, start, stop)

    def sums(self, outputs: torch.Tensor, batch: MicroBatch) -> Sums:
        """See `Objective.sums`; `outputs`: fp32 [R, T]."""
        scores = pool_last(outputs, batch.segment_lengths)
        groups, labels = batch.rankings, batch.labels
        ranks, margins, probabilities = (
            torch.from_numpy(labels[name].copy()).to(scores.device) for name in ("rank", "margin", "probability")
        )
        terms = ranking_losses(scores, ranks, groups)
        firsts = torch.tensor([0, *accumulate(groups)][:-1], dtype=torch.long, device=scores.device)
        differences = scores[firsts] - scores[firsts + 1]
        pairs = comparison_losses(differences, margins[firsts], probabilities[firsts])
        losses = torch.where(torch.tensor(groups, device=scores.device) == 2, pairs, terms.losses)
        values = (terms.accuracies, terms.margins, terms.confidences)
        return Sums(losses.sum(), {name: value.sum() for name, value in zip(self.metrics, values, strict=True)})


class BestScores:
    """Not a loss: the mean score of the best answers, which becomes a reward model's offset.

    A demonstration is the best of its one answer.
    """

    metrics: tuple[str, ...] = ()

    def units(self, prepared: PreparedData, plan: PlanName, start: int, stop: int) -> int:
        """Prompts."""
        return prepared.rankings(plan, start, stop)

    def sums(self, outputs: torch.Tensor, batch: MicroBatch) -> Sums:
        """See `Objective.sums`; `outputs`: fp32 [R, T]."""
        best = torch.from_numpy(batch.labels["position"] == 0).to(outputs.device)
        return Sums(pool_last(outputs, batch.segment_lengths)[best].sum())


class Pairwise:
    """Preference optimisation on pairs: a row's segments are chosen, rejected, chosen, rejected, and so on."""

    metrics: tuple[str, ...] = (
        "rewards_chosen",
        "rewards_rejected",
        "rewards_margin",
        "accuracy",
        "accuracy_per_token",
        "length_chosen",
        "length_rejected",
    )

    def __init__(self, reference: Forward, settings: Preference) -> None:
        """`reference`: the starting weights, with dropout off."""
        self._reference = reference
        self._settings = settings

    def units(self, prepared: PreparedData, plan: PlanName, start: int, stop: int) -> int:
        """Pairs: each counts the same, whatever its length and whoever has it."""
        return prepared.rankings(plan, start, stop)

    def sums(self, outputs: torch.Tensor, batch: MicroBatch) -> Sums:
        """See `Objective.sums`; `outputs`: of a `LanguageModel`.

        A reward is beta times the log-ratio to the reference (Rafailov et al. 2023, § 4).
        """
        reference = self.reference_log_probs(batch)
        chosen, rejected = (self._log_probs(outputs, batch) - reference).view(-1, 2).unbind(dim=1)
        rewards = [self._settings.beta * ratios.detach() for ratios in (chosen, rejected)]
        lengths = torch.tensor(batch.loss_tokens, device=chosen.device).view(-1, 2).unbind(dim=1)
        margins = rewards[0] - rewards[1]
        per_token = rewards[0] / lengths[0] - rewards[1] / lengths[1]
        values = (*rewards, margins, _wins(margins), _wins(per_token), *lengths)
        losses = preference_losses(chosen - rejected, self._settings)
        return Sums(losses.sum(), {name: value.sum() for name, value in zip(self.metrics, values, strict=True)})

    @torch.no_grad()
    def reference_log_probs(self, batch: MicroBatch) -> torch.Tensor:
        """Log pi_ref(y|x) of each answer, fp32 [S]."""
        return self._log_probs(self._reference(batch), batch)

    def _log_probs(self, outputs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return segment_sums(outputs[0], batch.loss_tokens)


def _wins(margins: torch.Tensor) -> torch.Tensor:
    """1 for a positive margin, one half for none."""
    return (margins > 0).float() + 0.5 * (margins == 0)


class RecordedPairwise(Pairwise):
    """The same, where the reference's log-probabilities are known beforehand."""

    def __init__(self, recorded: Callable[[MicroBatch], torch.Tensor], settings: Preference) -> None:
        """`recorded`: what `Pairwise.reference_log_probs` once gave."""
        super().__init__(recorded, settings)

    def reference_log_probs(self, batch: MicroBatch) -> torch.Tensor:
        """See `Pairwise`."""
        return self._reference(batch)
