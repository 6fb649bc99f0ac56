"""What a step of PPO learns from: sampled answers, and what its models say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from trimtab_trainer.algorithms.ppo import missing_end_scores
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PlanName, PreparedData
from trimtab_trainer.engine.batches import MicroBatch, collate, in_micro_batches, rows_of_rank
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.objectives import Forward
from trimtab_trainer.engine.reward import Reward, RewardModel
from trimtab_trainer.engine.rollout import Episode
from trimtab_trainer.engine.rollout_check import RolloutCheck
from trimtab_trainer.engine.samplers import build_sampler
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.ppo_settings import Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class Models:
    """Actor and critic are trained, the reference is frozen: a model of its own, or the actor with its adapter off."""

    actor: Engine
    critic: Engine
    reference: Forward
    reward: Reward
    offset: float
    """What a value is less than the critic's score: the offset of the reward model that it starts from, or 0."""
    held_out: RewardModel | None = None
    """Scores answers to held-out prompts; nothing learns from it."""


@dataclass
class Experience:
    """An episode with what a step knows of its T actions: fp32 [T] each, in nats or units of reward."""

    episode: Episode
    log_probs: torch.Tensor
    """By the policy that sampled it, in a forward pass as in training."""
    weights: torch.Tensor
    """Importance weights of a sampler that is another program; 1 else."""
    reference: torch.Tensor
    """Log-probabilities by the reference."""
    values: torch.Tensor
    """V of the state before each action, by the critic before the step."""
    entropy: torch.Tensor
    score: torch.Tensor
    """fp32 scalar: the reward, or that of a missing end."""
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    returns: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class Judge:
    """Samples answers and puts them through all models, in micro-batches of the stage's size."""

    def __init__(
        self, models: Models, group: Group, prepared: PreparedData, config: TrainConfig, rollout: Rollout
    ) -> None:
        self._models, self._group, self._prepared, self._rollout = models, group, prepared, rollout
        self._micro_batch_size = config.recipe.micro_batch_size
        self._sampler = build_sampler(models.actor, group, prepared, config, rollout)
        self._check = RolloutCheck(models.actor, group, config, rollout) if self._sampler.foreign else None
        self.told: dict[str, float] = {}
        """Of the last answers: how well sampler and model in training agree; see `metrics`."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names in `told`."""
        return self._check.metrics if self._check else ()

    @torch.no_grad()
    def answer(
        self, plan: PlanName, start: int, stop: int, stream: int, beat: Callable[[], None] = lambda: None
    ) -> list[Experience]:
        """Answers to this rank's part of the prompts in the rows [start, stop) of a plan; collective.

        Args:
            plan: whose rows.
            start: first row.
            stop: row after the last one.
            stream: see `Sampler.sample`.
            beat: called after each micro-batch.

        Raises:
            TrainingFailed: the sampler has other weights than the model in training.
        """
        engines = (self._models.actor.deepspeed, self._models.critic.deepspeed)
        for engine in engines:
            engine.eval()
        own = rows_of_rank(start, stop, self._group.rank, self._group.size)
        prompts = [self._prepared.row(plan, i) for i in own]
        sampled = self._sampler.sample(prompts, stop - start, stream, beat)
        found: list[Experience] = []
        for episodes in self.micro_batches(sampled, stop - start):
            found += self._judge(episodes)
            beat()
        if self._check:
            self.told = self._check.conclude()
        for engine in engines:
            engine.train()
        return found

    def held_out_scores(self, experience: Sequence[Experience], beat: Callable[[], None]) -> list[float]:
        """Of each episode, by the reward model that watches; none without one."""
        if self._models.held_out is None:
            return []
        found: list[float] = []
        for start in range(0, len(experience), self._micro_batch_size):
            episodes = [each.episode for each in experience[start : start + self._micro_batch_size]]
            found += self._models.held_out(episodes, self.collate(episodes)).tolist()
            beat()
        return found

    def micro_batches(self, own: Sequence[T], rows: int) -> Iterator[list[T]]:
        """This rank's part of so many rows in micro-batches, as many as every rank runs."""
        return in_micro_batches(own, rows, self._group.size, self._micro_batch_size)

    def collate(self, episodes: Sequence[Episode]) -> MicroBatch:
        """Episodes side by side, one a row, on the device."""
        rows = [episode.row for episode in episodes]
        return collate(rows, self._prepared.info.padding_id).to(self._models.actor.device)

    def values(self, scores: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """V of the state before each action, fp32 [N], of the critic's scores [R, T]."""
        return scores[:, :-1][batch.loss_mask[:, 1:]] - self._models.offset

    def _judge(self, episodes: Sequence[Episode]) -> list[Experience]:
        models, batch = self._models, self.collate(episodes)
        log_probs, entropies = models.actor.outputs(batch)
        weights = torch.ones_like(log_probs)
        if self._check:
            weights = self._check.weights(episodes, log_probs, entropies)
        reference, _ = models.reference(batch)
        values = self.values(models.critic.outputs(batch), batch)
        ended = torch.tensor([episode.ended for episode in episodes], dtype=torch.bool, device=values.device)
        scores = missing_end_scores(models.reward(episodes, batch), ended, self._rollout.missing_end_reward)
        parts = [part.split(list(batch.loss_tokens)) for part in (log_probs, weights, reference, values, entropies)]
        return [Experience(*each) for each in zip(episodes, *parts, scores, strict=True)]
