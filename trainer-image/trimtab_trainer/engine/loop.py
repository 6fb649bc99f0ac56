"""The optimiser loop, the same for every stage: rows in, one update a step, metrics out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from trimtab_trainer.algorithms.schedule import learning_rate
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PlanName, PreparedData, Row
from trimtab_trainer.engine.batches import MicroBatch, Step, collate, in_micro_batches, rows_of_rank
from trimtab_trainer.engine.checkpoint import Saved
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.objectives import Objective, Sums
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import TrainingFailed

_NAMED_RECORDS = 8


@dataclass(frozen=True)
class StepResult:
    """One update: what the metrics report of it."""

    loss: float
    """Mean over the step's units (tokens, pairs), over all processes."""
    gradient_norm: float
    """Global, before clipping."""
    learning_rate: float
    tokens: int
    """Input tokens over all processes, padding excluded."""
    stop: bool
    """Some process was told to stop; all processes see the same."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the objective, as means over the same units."""


class Loop:
    """Trains and validates with one engine on one prepared folder."""

    def __init__(
        self,
        engine: Engine,
        group: Group,
        prepared: PreparedData,
        config: TrainConfig,
        objective: Objective,
        told_to_stop: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._group = group
        self._prepared = prepared
        self._config = config
        self._objective = objective
        self._told_to_stop = told_to_stop

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the objective's means."""
        return self._objective.metrics

    @property
    def engines(self) -> dict[str, Saved]:
        """What a checkpoint holds, by name."""
        return {"deepspeed": self._engine}

    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the result, on rank 0. Collective."""
        return self._engine.weights()

    @property
    def state(self) -> dict[str, float]:
        """What is carried from step to step besides the engines: nothing."""
        return {}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        pass

    def step(self, step: Step) -> StepResult:
        """One optimiser step: the gradient of the mean loss over all its units.

        Raises:
            TrainingFailed: loss or gradient is not finite; names the records. Weights are untouched where the loss is.
        """
        recipe = self._config.recipe
        units = max(1, self._objective.units(self._prepared, step.epoch, step.start, step.stop))
        # DeepSpeed averages gradients over processes, hence the factor
        scale = self._group.size / units
        totals = self._totals()
        tokens = 0
        rows = (self._prepared.row(step.epoch, i) for i in self._own_rows(step.start, step.stop))
        for batch, batch_tokens in self._micro_batches(rows, step.stop - step.start):
            sums = self._objective.sums(self._engine.outputs(batch), batch)
            self._engine.backward(sums.loss * scale)
            totals += _stacked(sums)
            tokens += batch_tokens
        *sums_of_all, total_tokens, stop = self._group.sum(*totals, tokens, float(self._told_to_stop()))
        mean_loss, *means = (total / units for total in sums_of_all)
        if not math.isfinite(mean_loss):
            raise self._not_finite(step, f"the loss is {mean_loss}")
        rate = learning_rate(recipe, step.index, self._prepared.info.total_steps)
        norm = self._engine.step(rate)
        if not math.isfinite(norm):
            raise self._not_finite(step, f"the gradient norm is {norm}")
        metrics = dict(zip(self._objective.metrics, means, strict=True))
        return StepResult(mean_loss, norm, rate, int(total_tokens), stop > 0, metrics)

    @torch.no_grad()
    def validate(self, plan: PlanName, beat: Callable[[], None]) -> dict[str, float]:
        """`loss` and the objective's metrics, as means over the units of held-out rows; dropout off.

        Args:
            plan: whose rows.
            beat: called after each micro-batch, so that a long validation is no hang.
        """
        rows = self._prepared.rows(plan)
        module = self._engine.deepspeed
        module.eval()
        totals = self._totals()
        own = (self._prepared.row(plan, i) for i in self._own_rows(0, rows))
        for batch, _ in self._micro_batches(own, rows):
            totals += _stacked(self._objective.sums(self._engine.outputs(batch), batch))
            beat()
        module.train()
        units = max(1, self._objective.units(self._prepared, plan, 0, rows))
        names = ("loss", *self._objective.metrics)
        return {name: total / units for name, total in zip(names, self._group.sum(*totals), strict=True)}

    def samples(self) -> list[dict[str, str | float]]:
        """What the model writes, to be read by people: nothing, where the stage does not sample."""
        return []

    def _not_finite(self, step: Step, what: str) -> TrainingFailed:
        remedy = "lower train.learningRate or lengthen train.warmupRatio"
        return not_finite(self._prepared, step, what, remedy, self._config.stage)

    def _totals(self) -> torch.Tensor:
        """Zeros for the loss and each metric."""
        return torch.zeros(1 + len(self._objective.metrics), dtype=torch.float64, device=self._engine.device)

    def _own_rows(self, start: int, stop: int) -> range:
        return rows_of_rank(start, stop, self._group.rank, self._group.size)

    def _micro_batches(self, own: Iterator[Row], rows: int) -> Iterator[tuple[MicroBatch, int]]:
        """This rank's micro-batches of a step of `rows` rows, as many as every rank runs, with their tokens."""
        size = self._config.recipe.micro_batch_size
        padding_id = self._prepared.info.padding_id
        for chunk in in_micro_batches(own, rows, self._group.size, size):
            yield collate(chunk, padding_id).to(self._engine.device), sum(len(row.input_ids) for row in chunk)


def not_finite(prepared: PreparedData, step: Step, what: str, remedy: str, stage: str) -> TrainingFailed:
    """The error of a step whose loss or gradient is not finite; it names the records."""
    rows = (prepared.row(step.epoch, i) for i in range(step.start, step.stop))
    names = prepared.record_names(record for row in rows for record in row.record_ids)
    shown = ", ".join(names[:_NAMED_RECORDS])
    more = f" and {len(names) - _NAMED_RECORDS} more" if len(names) > _NAMED_RECORDS else ""
    return TrainingFailed(
        f"step {step.index + 1}: {what}; the step's records: {shown}{more}; look at these records, {remedy}",
        reason="NotFinite",
        stage=stage,
    )


def _stacked(sums: Sums) -> torch.Tensor:
    """The loss and each metric, fp64."""
    return torch.stack([sums.loss.detach(), *sums.metrics.values()]).double()
