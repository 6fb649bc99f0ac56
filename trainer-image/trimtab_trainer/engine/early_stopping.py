"""Early stopping: when a stage ends before its last step, and whose weights are its result."""

from __future__ import annotations

import math
from typing import Self

from trimtab_trainer.checkpoints import Best
from trimtab_trainer.config import StageType, TrainConfig
from trimtab_trainer.data.store import PreparedInfo
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.settings import EarlyStopping


class Stopper:
    """Follows the validation loss. All ranks see the same losses, so all of them decide the same.

    Without early stopping it has no best step and never stops. The measurement before the first step does not count:
    the result of a stage has been trained.
    """

    def __init__(self, settings: EarlyStopping | None) -> None:
        self._settings = settings
        self.best: Best | None = None

    @classmethod
    def of(cls, config: TrainConfig, info: PreparedInfo) -> Self:
        """Of a stage.

        Raises:
            BadConfiguration: there is no loss to follow.
        """
        if config.early_stopping is None:
            return cls(None)
        if config.type is StageType.PPO:
            raise BadConfiguration("ppo can't stop early by a loss; remove earlyStopping", stage=config.stage)
        if config.validation_every_steps is None or not info.has_validation:
            raise BadConfiguration("earlyStopping needs held-out rows and everySteps", stage=config.stage)
        return cls(config.early_stopping)

    def is_improvement(self, step: int, loss: float) -> bool:
        """Take a measurement after `step`; whether the weights of this step are the best so far."""
        if self._settings is None or step == 0:
            return False
        best = self.best
        if math.isfinite(loss) and (best is None or best.loss - loss > self._settings.minimum_improvement):
            self.best = Best(step=step, loss=loss)
            return True
        if best is not None:
            self.best = best.model_copy(update={"measured_since": best.measured_since + 1})
        return False

    @property
    def has_stopped(self) -> bool:
        """Whether patience is at its end."""
        return (
            self._settings is not None and self.best is not None and self.best.measured_since >= self._settings.patience
        )
