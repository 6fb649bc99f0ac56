"""The optimiser loop, the same for every stage: rows in, one update a step, metrics out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from trimtab_trainer.algorithms.causal_lm import token_loss_sum
from trimtab_trainer.algorithms.schedule import learning_rate
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PreparedData, Row
from trimtab_trainer.engine.batches import MicroBatch, Step, collate, micro_batch_count, rows_of_rank
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import TrainingFailed

_NAMED_RECORDS = 8


@dataclass(frozen=True)
class StepResult:
    """One update: what the metrics report of it."""

    loss: float
    """Nats per loss-bearing token of the step, over all processes."""
    gradient_norm: float
    """Global, before clipping."""
    learning_rate: float
    tokens: int
    """Input tokens over all processes, padding excluded."""
    stop: bool
    """Some process was told to stop; all processes see the same."""


class Loop:
    """Trains and validates with one engine on one prepared folder."""

    def __init__(
        self,
        engine: Engine,
        group: Group,
        prepared: PreparedData,
        config: TrainConfig,
        told_to_stop: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._group = group
        self._prepared = prepared
        self._config = config
        self._told_to_stop = told_to_stop

    def step(self, step: Step) -> StepResult:
        """One optimiser step: the gradient of the mean loss over all its loss-bearing tokens.

        Raises:
            TrainingFailed: loss or gradient is not finite; names the records. Weights are untouched where the loss is.
        """
        recipe = self._config.recipe
        loss_tokens = max(1, self._prepared.loss_tokens(step.epoch, step.start, step.stop))
        # DeepSpeed averages gradients over processes, hence the factor
        scale = self._group.size / loss_tokens
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        tokens = 0
        rows = (self._prepared.row(step.epoch, i) for i in self._own_rows(step.start, step.stop))
        for batch, batch_tokens in self._micro_batches(rows, step.stop - step.start):
            loss = token_loss_sum(
                self._engine.logits(batch.input_ids, batch.position_ids), batch.input_ids, batch.loss_mask
            )
            self._engine.backward(loss * scale)
            loss_sum += loss.detach()
            tokens += batch_tokens
        total_loss, total_tokens, stop = self._group.sum(loss_sum, tokens, float(self._told_to_stop()))
        mean_loss = total_loss / loss_tokens
        if not math.isfinite(mean_loss):
            raise self._diverged(step, f"the loss is {mean_loss}")
        rate = learning_rate(recipe, step.index, self._prepared.info.total_steps)
        norm = self._engine.step(rate)
        if not math.isfinite(norm):
            raise self._diverged(step, f"the gradient norm is {norm}")
        return StepResult(mean_loss, norm, rate, int(total_tokens), stop > 0)

    @torch.no_grad()
    def validate(self, beat: Callable[[], None]) -> float:
        """Mean loss over all loss-bearing tokens of the held-out rows, in nats; dropout off.

        Args:
            beat: called after each micro-batch, so that a long validation is no hang.
        """
        rows = self._prepared.validation_rows()
        module = self._engine.deepspeed
        module.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        own = (self._prepared.validation_row(i) for i in self._own_rows(0, rows))
        for batch, _ in self._micro_batches(own, rows):
            logits = self._engine.logits(batch.input_ids, batch.position_ids)
            loss_sum += token_loss_sum(logits, batch.input_ids, batch.loss_mask)
            beat()
        module.train()
        (total,) = self._group.sum(loss_sum)
        return total / max(1, self._prepared.validation_loss_tokens(0, rows))

    def _own_rows(self, start: int, stop: int) -> range:
        return rows_of_rank(start, stop, self._group.rank, self._group.size)

    def _micro_batches(self, own: Iterator[Row], rows: int) -> Iterator[tuple[MicroBatch, int]]:
        """This rank's micro-batches of a step of `rows` rows, as many as every rank runs, with their tokens."""
        size = self._config.recipe.micro_batch_size
        padding_id = self._prepared.info.padding_id
        for _ in range(micro_batch_count(rows, self._group.size, size)):
            chunk = list(islice(own, size))
            yield collate(chunk, padding_id).to(self._engine.device), sum(len(row.input_ids) for row in chunk)

    def _diverged(self, step: Step, what: str) -> TrainingFailed:
        records = dict.fromkeys(
            record for i in range(step.start, step.stop) for record in self._prepared.row(step.epoch, i).record_ids
        )
        names = [self._prepared.record_name(record) for record in list(records)[:_NAMED_RECORDS]]
        more = f" and {len(records) - len(names)} more" if len(records) > len(names) else ""
        return TrainingFailed(
            f"step {step.index + 1}: {what}; the step's records: {', '.join(names)}{more}; look at these records, "
            "lower train.learningRate or lengthen train.warmupRatio",
            reason="NotFinite",
            stage=self._config.stage,
        )
