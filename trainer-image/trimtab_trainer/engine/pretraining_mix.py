"""PPO-ptx: the next-token loss of other data, learnt in the same updates (Ouyang et al. 2022, equation 2)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.batches import Step, collate, in_micro_batches, rows_of_rank
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.loop import not_finite
from trimtab_trainer.engine.networks import at_temperature
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.ppo_settings import PretrainingMix


class MixGradients:
    """Adds gamma times the gradient of the mix's mean loss to what an update has accumulated."""

    def __init__(
        self, engine: Engine, group: Group, prepared: PreparedData, config: TrainConfig, mix: PretrainingMix
    ) -> None:
        """`prepared`: of the stage.

        Raises:
            BadConfiguration: it holds no mix.
        """
        if prepared.pretraining_mix is None:
            raise BadConfiguration(
                f"{prepared.folder} holds no pretraining mix; prepare the stage again", stage=config.stage
            )
        self._engine, self._group, self._config, self._mix = engine, group, config, mix
        self._prepared = prepared.pretraining_mix
        self.row = 0
        """Rows of the plan that are done."""

    def add(self, step: Step) -> float:
        """Accumulate the gradient of the next rows; returns their mean loss in nats a token. Collective.

        Raises:
            TrainingFailed: the loss is not finite; names the records.
        """
        start, stop = self.row, self.row + self._prepared.info.global_batch_size
        tokens = max(1, self._prepared.loss_tokens(0, start, stop))
        scale = self._mix.coefficient * self._group.size / tokens  # DeepSpeed averages over processes
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        own = rows_of_rank(start, stop, self._group.rank, self._group.size)
        size = self._config.recipe.micro_batch_size
        for rows in in_micro_batches(own, stop - start, self._group.size, size):
            batch = collate([self._prepared.row(0, i) for i in rows], self._prepared.info.padding_id)
            batch = batch.to(self._engine.device)
            with at_temperature(self._engine.network, 1.0):  # whatever that of the rollouts is
                log_probs, _ = self._engine.outputs(batch)
            loss = -log_probs.sum()
            self._engine.backward(loss * scale)
            total += loss.detach().double()
        mean = self._group.sum(total)[0] / tokens
        if not math.isfinite(mean):
            rows_of_mix = replace(step, epoch=0, start=start, stop=stop)
            what, remedy = f"the pretraining loss is {mean}", "lower train.learningRate"
            raise not_finite(self._prepared, rows_of_mix, what, remedy, self._config.stage)
        self.row = stop
        return mean
