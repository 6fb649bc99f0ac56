"""Early stopping: when a stage ends before its last step, and whose weights are its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from trimtab_trainer.checkpoints import Best
from trimtab_trainer.config import StageType, TrainConfig
from trimtab_trainer.data.store import PreparedInfo
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.ppo_settings import HeldOutReward
from trimtab_trainer.settings import EarlyStopping

HELD_OUT_SCORE = "held_out_score"
"""Of answers to held-out prompts, by a reward model that nothing learns from."""


class Rule(Protocol):
    """Decides by one measurement after the other."""

    @property
    def patience(self) -> int:
        """After so many measurements in a row that ask for it, the stage ends."""

    def next(self, best: Best | None, step: int, measured: Mapping[str, float]) -> Best | None:
        """The best measurement, now that one was made after `step`."""


class LowestLoss:
    """The best measurement is that of the lowest validation loss; each one that is no improvement asks for an end."""

    def __init__(self, settings: EarlyStopping) -> None:
        self.patience = settings.patience
        self._improvement = settings.minimum_improvement

    def next(self, best: Best | None, step: int, measured: Mapping[str, float]) -> Best | None:
        """See `Rule`."""
        loss = measured["validation_loss"]
        if math.isfinite(loss) and (best is None or best.loss - loss > self._improvement):
            return Best(step=step, loss=loss)
        return best and best.model_copy(update={"measured_since": best.measured_since + 1})


class GamedReward:
    """The best measurement is that of the highest held-out score; one asks for an end where the reward is gamed.

    That is: the policy's own reward is higher than at the best measurement, and the held-out score lower. What no
    reward model was trained on, both see alike; where they part, one of them is wrong, and the policy has found where
    (Gao et al. 2022). A measurement that is neither an improvement nor gamed starts the count anew.
    """

    def __init__(self, settings: HeldOutReward) -> None:
        self.patience = settings.patience
        self._fall = settings.minimum_fall

    def next(self, best: Best | None, step: int, measured: Mapping[str, float]) -> Best | None:
        """See `Rule`."""
        reward, held_out = measured["validation_score"], measured[f"validation_{HELD_OUT_SCORE}"]
        if math.isfinite(held_out) and (best is None or held_out > -best.loss):
            return Best(step=step, loss=-held_out, reward=reward)
        if best is None or best.reward is None:
            return best
        gamed = reward > best.reward and held_out < -best.loss - self._fall
        return best.model_copy(update={"measured_since": best.measured_since + 1 if gamed else 0})


class Stopper:
    """Follows what is measured. All ranks see the same numbers, so all of them decide the same.

    Without a rule it has no best step and never stops. The measurement before the first step does not count: the result
    of a stage has been trained.
    """

    def __init__(self, rule: Rule | None) -> None:
        self._rule = rule
        self.best: Best | None = None

    def is_improvement(self, step: int, measured: Mapping[str, float]) -> bool:
        """Take a measurement after `step`; whether the weights of this step are the best so far."""
        if self._rule is None or step == 0:
            return False
        self.best = self._rule.next(self.best, step, measured)
        return self.best is not None and self.best.step == step

    @property
    def has_stopped(self) -> bool:
        """Whether patience is at its end."""
        return self._rule is not None and self.best is not None and self.best.measured_since >= self._rule.patience


def build_stopper(config: TrainConfig, info: PreparedInfo) -> Stopper:
    """Of a stage.

    Raises:
        BadConfiguration: there is nothing to follow.
    """
    if not config.stops_early:
        return Stopper(None)
    if config.validation_every_steps is None or not info.has_validation:
        raise BadConfiguration("earlyStopping needs held-out rows and everySteps", stage=config.stage)
    if config.ppo is not None and config.ppo.early_stopping is not None:
        if config.held_out_reward is None:
            raise BadConfiguration("earlyStopping of ppo needs a held-out reward model", stage=config.stage)
        return Stopper(GamedReward(config.ppo.early_stopping))
    if config.type is StageType.PPO or config.early_stopping is None:
        raise BadConfiguration("ppo can't stop early by a loss; remove earlyStopping", stage=config.stage)
    return Stopper(LowestLoss(config.early_stopping))
