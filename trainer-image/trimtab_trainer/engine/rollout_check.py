"""What the sampler said of its tokens against what the model in training says: one check, one correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab_trainer.algorithms.importance import importance_weights
from trimtab_trainer.algorithms.rounding import LIMIT, log_prob_variance
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.model import DTYPES
from trimtab_trainer.engine.rollout import Episode
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import TrainingFailed
from trimtab_trainer.ppo_settings import Rollout

DIFFERENCE, RATIO, TRUNCATED = "rollout_difference", "importance_ratio", "importance_truncated"
METRICS = (DIFFERENCE, RATIO, TRUNCATED)


class RolloutCheck:
    """Compares every sampled token, so weights that did not reach the sampler never reach an update either.

    A rank has a sampler of its own, and so a verdict of its own; the worst counts, and all ranks hear it.
    """

    metrics: tuple[str, ...] = METRICS

    def __init__(self, engine: Engine, group: Group, config: TrainConfig, rollout: Rollout) -> None:
        self._group, self._rollout, self._stage = group, rollout, config.stage
        shape = engine.module.config.get_text_config()
        self._vocabulary = int(shape.vocab_size)
        self._layers = int(shape.num_hidden_layers)
        self._width = max(shape.hidden_size, getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size)
        self._dtype = DTYPES[config.precision]
        self._sums = self._zeros()

    def weights(self, episodes: Sequence[Episode], log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """Importance weight of each of the N actions of a micro-batch, fp32 [N], and a note for the verdict.

        Args:
            episodes: whose actions.
            log_probs: of the actions, by the model in training, fp32 [N].
            entropies: of their distributions, fp32 [N].
        """
        said = np.concatenate([np.zeros(0, np.float32), *(_said(each) for each in episodes)])
        sampler = torch.from_numpy(said).to(log_probs.device)
        variance = log_prob_variance(log_probs, entropies, self._vocabulary, self._dtype, self._layers, self._width)
        difference = log_probs - sampler
        cap = self._rollout.vllm.importance_cap
        columns = (torch.ones_like(difference), difference.square(), variance, difference.exp(), difference.exp() > cap)
        self._sums += torch.stack([column.double().sum() for column in columns]).cpu()
        return importance_weights(log_probs, sampler, cap)

    def conclude(self) -> dict[str, float]:
        """The verdict on all that was noted since the last one, and its figures; collective.

        Raises:
            TrainingFailed: the sampler has other weights than the model in training.
        """
        actions, squares, variance, ratios, truncated = self._sums.tolist()
        self._sums = self._zeros()
        difference, expected = ((total / max(1.0, actions)) ** 0.5 for total in (squares, variance))
        worst = self._group.max(difference / expected if actions else 0.0)
        largest = self._group.max(difference)
        if not worst <= LIMIT:
            raise TrainingFailed(
                f"the sampler's log-probabilities differ from those of the model in training by {largest:.3g} nats "
                f"(root mean square), {worst:.3g} times what rounding explains; the limit is {LIMIT:g}: its weights "
                "are not those of this step; set ppo.rollout.engine: transformers",
                reason="RolloutOutOfSync",
                stage=self._stage,
            )
        actions, ratios, truncated = self._group.sum(actions, ratios, truncated)
        return {DIFFERENCE: largest, RATIO: ratios / max(1.0, actions), TRUNCATED: truncated / max(1.0, actions)}

    @staticmethod
    def _zeros() -> torch.Tensor:
        return torch.zeros(5, dtype=torch.float64)


def _said(episode: Episode) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if episode.log_probs is None:
        raise ValueError("an episode of this sampler has log-probabilities")
    return episode.log_probs
