"""Proximal policy optimisation: a step samples answers, scores them, and updates actor and critic on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from trimtab_trainer.algorithms.advantages import explained_variance, gae, moments, whiten
from trimtab_trainer.algorithms.causal_lm import targets
from trimtab_trainer.algorithms.kl import next_coefficient
from trimtab_trainer.algorithms.ppo import entropy, missing_end_scores, policy_loss, token_rewards, value_loss
from trimtab_trainer.algorithms.reward import pool_last
from trimtab_trainer.algorithms.schedule import learning_rate
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PlanName, PreparedData, Row
from trimtab_trainer.engine.batches import MicroBatch, Step, collate, micro_batch_count, rows_of_rank
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.loop import StepResult
from trimtab_trainer.engine.networks import Network
from trimtab_trainer.engine.rollout import Episode, Sampler
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import TrainingFailed
from trimtab_trainer.settings import Ppo

T = TypeVar("T")

ANSWERS_FILE = "sampleAnswers.jsonl"
_HELD_OUT = -1
_SHOWN = 4
"""Answers that are written down at each measurement of the held-out prompts."""


@dataclass(frozen=True)
class Models:
    """Actor and critic are trained; reference and reward model are frozen. `offset` is the reward model's."""

    actor: Engine
    critic: Engine
    reference: Network
    reward: Network
    offset: float


@dataclass
class Experience:
    """An episode with what the step knows of its T actions; fp32 [T] each, on the device."""

    episode: Episode
    log_probs: torch.Tensor
    """By the policy that sampled it, in a forward pass as in training."""
    reference: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor
    """fp32 scalar: the reward model's, or that of a missing end."""
    entropy: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class PpoLoop:
    """Trains actor and critic on prompts; a row is a prompt, and a step samples one answer to each of its rows."""

    metrics: tuple[str, ...] = (
        "value_loss",
        "score",
        "kl_sequence",
        "kl_coefficient",
        "entropy",
        "clip_fraction",
        "value_clip_fraction",
        "explained_variance",
        "response_length",
        "ended_fraction",
        "ratio_first",
    )

    def __init__(
        self,
        models: Models,
        group: Group,
        prepared: PreparedData,
        config: TrainConfig,
        ppo: Ppo,
        told_to_stop: Callable[[], bool],
    ) -> None:
        self._models, self._group, self._prepared, self._config, self._ppo = models, group, prepared, config, ppo
        self._told_to_stop = told_to_stop
        info = prepared.info
        self._sampler = Sampler(models.actor, ppo.rollout, config.recipe.seed, info.end_of_turn_id, info.padding_id)
        self.kl_coefficient = ppo.kl.coefficient
        self._critic_recipe = config.recipe.model_copy(update={"learning_rate": ppo.critic.learning_rate})

    @property
    def engines(self) -> dict[str, Engine]:
        """What a checkpoint holds, by name."""
        return {"deepspeed": self._models.actor, "critic": self._models.critic}

    def step(self, step: Step) -> StepResult:
        """One rollout and its updates.

        Raises:
            TrainingFailed: a loss is not finite, or the policy has moved further than `kl.maximum`.
        """
        own = list(self._own(step.epoch, step.start, step.stop))
        experience = self._experience(own, step.stop - step.start, step.index)
        kl, told = self._tell(experience)
        if self._ppo.kl.maximum is not None and kl > self._ppo.kl.maximum:
            raise TrainingFailed(
                f"step {step.index + 1}: the policy is {kl:.3g} nats a sequence away from its starting weights, more "
                f"than kl.maximum = {self._ppo.kl.maximum:g}; raise kl.coefficient or lower train.learningRate",
                reason="KlTooLarge",
                stage=self._config.stage,
            )
        self._advantages(experience)
        none = torch.zeros(0, device=self._models.actor.device)
        returns = torch.cat([none, *(each.returns for each in experience)])
        errors = torch.cat([none, *(each.returns - each.values for each in experience)])
        told["explained_variance"] = explained_variance(self._sum_all(returns), self._sum_all(errors))
        updates: list[dict[str, float]] = []
        rate = learning_rate(self._config.recipe, step.index, self._prepared.info.total_steps)
        critic_rate = learning_rate(self._critic_recipe, step.index, self._prepared.info.total_steps)
        for _ in range(self._ppo.passes):
            for start, stop in self._minibatches(step):
                # rank r has every size-th row of the step, so its part of [start, stop) follows
                first = -(-(start - step.start - self._group.rank) // self._group.size)
                last = -(-(stop - step.start - self._group.rank) // self._group.size)
                part = experience[first:last]
                updates.append(self._update(part, stop - start, step, rate, critic_rate, first=not updates))
        told["kl_coefficient"] = self.kl_coefficient
        if self._ppo.kl.target is not None:
            episodes = step.stop - step.start
            self.kl_coefficient = next_coefficient(
                self.kl_coefficient, kl, self._ppo.kl.target, self._ppo.kl.horizon, episodes
            )
        names = ("loss", "value_loss", "clip_fraction", "value_clip_fraction", "gradient_norm")
        means = {name: sum(update[name] for update in updates) / len(updates) for name in names}
        told |= {name: means[name] for name in names[1:4]}
        told["ratio_first"] = updates[0]["ratio_first"]
        tokens, stop_wanted = self._group.sum(
            sum(len(each.episode.row.input_ids) for each in experience), float(self._told_to_stop())
        )
        return StepResult(
            means["loss"],
            means["gradient_norm"],
            rate,
            int(tokens),
            stop_wanted > 0,
            {name: told[name] for name in self.metrics},
        )

    def validate(self, plan: PlanName, beat: Callable[[], None]) -> dict[str, float]:
        """Scores and KL of sampled answers to held-out prompts; the random numbers are the same each time."""
        rows = self._prepared.rows(plan)
        experience = self._experience(list(self._own(plan, 0, rows)), rows, _HELD_OUT, beat)
        return self._tell(experience)[1]

    def answers(self, done: int, folder: Path) -> None:
        """Write down some answers to held-out prompts, else to the first epoch's first ones; collective."""
        plan: PlanName = "validation" if self._prepared.info.has_validation else 0
        count = min(_SHOWN, self._prepared.rows(plan))
        experience = self._experience(list(self._own(plan, 0, count)), count, _HELD_OUT)
        if not self._group.is_first:
            return
        from trimtab_trainer.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self._prepared.tokenizer_folder)
        with (folder / ANSWERS_FILE).open("a", encoding="utf-8") as file:
            for each in experience:
                row = each.episode.row
                prompt, answer = (tokenizer.decode(row.input_ids[row.loss_mask == side]) for side in (False, True))
                line = {"step": done, "prompt": prompt, "answer": answer, "score": round(float(each.score), 6)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _own(self, plan: PlanName, start: int, stop: int) -> Iterator[Row]:
        return (self._prepared.row(plan, i) for i in rows_of_rank(start, stop, self._group.rank, self._group.size))

    def _chunks(self, own: Sequence[T], rows: int) -> Iterator[list[T]]:
        """This rank's part in micro-batches, as many as every rank runs for so many rows."""
        size, rest = self._config.recipe.micro_batch_size, iter(own)
        for _ in range(micro_batch_count(rows, self._group.size, size)):
            yield list(islice(rest, size))

    @torch.no_grad()
    def _experience(
        self, own: Sequence[Row], rows: int, stream: int, beat: Callable[[], None] = lambda: None
    ) -> list[Experience]:
        """Sample, and put the episodes through all four models."""
        for engine in self.engines.values():
            engine.deepspeed.eval()
        found: list[Experience] = []
        for prompts in self._chunks(own, rows):
            found += self._judge(self._sampler.sample(prompts, stream))
            beat()
        for engine in self.engines.values():
            engine.deepspeed.train()
        return found

    def _judge(self, episodes: Sequence[Episode]) -> list[Experience]:
        batch = self._collate(episodes)
        logits, tokens = self._actions(self._models.actor.outputs(batch), batch)
        log_probs, spread = -cross_entropy(logits, tokens, reduction="none"), entropy(logits)
        reference = self._models.reference(batch.input_ids, batch.position_ids)
        held, _ = self._actions(reference, batch)
        values = self._values(self._models.critic.outputs(batch), batch)
        scores = pool_last(self._models.reward(batch.input_ids, batch.position_ids), batch.segment_lengths)
        ended = torch.tensor([episode.ended for episode in episodes], dtype=torch.bool, device=scores.device)
        scores = missing_end_scores(scores - self._models.offset, ended, self._ppo.rollout.missing_end_reward)
        parts = [
            part.split(list(batch.loss_tokens))
            for part in (log_probs, -cross_entropy(held, tokens, reduction="none"), values, spread)
        ]
        return [
            Experience(episode, own, kept, value, score, each, torch.empty(0), torch.empty(0))
            for episode, own, kept, value, each, score in zip(episodes, *parts, scores, strict=True)
        ]

    def _collate(self, episodes: Sequence[Episode]) -> MicroBatch:
        rows = [episode.row for episode in episodes]
        return collate(rows, self._prepared.info.padding_id).to(self._models.actor.device)

    def _actions(self, logits: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the sampling temperature, fp32 [N, V], and tokens, int64 [N], of the actions."""
        found, tokens = targets(logits, batch.input_ids, batch.loss_mask)
        return found / self._ppo.rollout.temperature, tokens

    def _values(self, scores: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """V of the state before each action, fp32 [N]."""
        return scores[:, :-1][batch.loss_mask[:, 1:]] - self._models.offset

    def _tell(self, experience: Sequence[Experience]) -> tuple[float, dict[str, float]]:
        """KL a sequence, and means over all ranks' episodes (of the entropy: over their actions)."""
        totals = [
            (1.0, each.score, (each.log_probs - each.reference).sum(), each.entropy.sum(), each.episode.actions)
            for each in experience
        ]
        sums = [sum(map(float, column)) for column in zip(*totals, strict=True)] if totals else [0.0] * 5
        ended = sum(each.episode.ended for each in experience)
        episodes, score, kl, spread, actions, its_ended = self._group.sum(*sums, ended)
        return kl / max(1, episodes), {
            "score": score / max(1, episodes),
            "kl_sequence": kl / max(1, episodes),
            "entropy": spread / max(1, actions),
            "response_length": actions / max(1, episodes),
            "ended_fraction": its_ended / max(1, episodes),
        }

    def _advantages(self, experience: Sequence[Experience]) -> None:
        """Fill in advantages, whitened over all ranks' actions, and returns."""
        device = self._models.actor.device
        advantages = torch.zeros(0, 1, device=device)
        mask = torch.zeros(0, 1, dtype=torch.bool, device=device)
        if experience:
            scores = torch.stack([each.score for each in experience])
            log_probs, reference, values = (
                pad_sequence(list(parts), batch_first=True)
                for parts in zip(*((each.log_probs, each.reference, each.values) for each in experience), strict=True)
            )
            lengths = torch.tensor([each.episode.actions for each in experience], device=device)
            mask = torch.arange(log_probs.shape[1], device=device)[None] < lengths[:, None]
            rewards = token_rewards(scores, log_probs, reference, mask, self.kl_coefficient)
            advantages, returns = gae(rewards, values, mask, self._ppo.discount, self._ppo.gae_lambda)
        whitened = whiten(advantages, mask, self._reduced(moments(advantages, mask)))
        for i, each in enumerate(experience):
            each.advantages, each.returns = (part[i, : each.episode.actions] for part in (whitened, returns))

    def _reduced(self, local: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self._group.sum(*local), dtype=torch.float64, device=self._models.actor.device)

    def _sum_all(self, values: torch.Tensor) -> torch.Tensor:
        """Moments of the values of all ranks."""
        return self._reduced(moments(values, torch.ones_like(values, dtype=torch.bool)))

    def _minibatches(self, step: Step) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) of each; the same at any number of ranks."""
        rows, parts = step.stop - step.start, min(self._ppo.minibatches, step.stop - step.start)
        bounds = [step.start + rows * part // parts for part in range(parts + 1)]
        return pairwise(bounds)

    def _update(
        self, part: Sequence[Experience], rows: int, step: Step, rate: float, critic_rate: float, *, first: bool
    ) -> dict[str, float]:
        """One update of actor and critic: means over all actions of the minibatch."""
        actor, critic = self._models.actor, self._models.critic
        (actions,) = self._group.sum(sum(each.episode.actions for each in part))
        scale = self._group.size / max(1.0, actions)
        totals = torch.zeros(4, dtype=torch.float64, device=actor.device)
        ratio = 0.0
        for chunk in self._chunks(part, rows):
            batch = self._collate([each.episode for each in chunk])
            none = torch.zeros(0, device=actor.device)
            old = torch.cat([none, *(each.log_probs for each in chunk)])
            advantages = torch.cat([none, *(each.advantages for each in chunk)])
            old_values = torch.cat([none, *(each.values for each in chunk)])
            returns = torch.cat([none, *(each.returns for each in chunk)])
            log_probs = -cross_entropy(*self._actions(actor.outputs(batch), batch), reduction="none")
            policy = policy_loss(log_probs, old, advantages, self._ppo.clip_range)
            actor.backward(policy.losses.sum() * scale)
            values = self._values(critic.outputs(batch), batch)
            value = value_loss(values, old_values, returns, self._ppo.value_clip_range)
            critic.backward(value.losses.sum() * scale)
            totals += torch.stack(
                [part.detach().double().sum() for part in (policy.losses, value.losses, policy.clipped, value.clipped)]
            )
            ratio = max(ratio, float((policy.ratio - 1).abs().max()) if len(chunk) else 0.0)
        sums = self._group.sum(*totals)
        loss, of_values, clipped, values_clipped = (total / max(1.0, actions) for total in sums)
        norm = actor.step(rate)
        critic_norm = critic.step(critic_rate)
        if not all(map(math.isfinite, (loss, of_values, norm, critic_norm))):
            names = self._prepared.record_names(
                record for i in range(step.start, step.stop) for record in self._prepared.row(step.epoch, i).record_ids
            )
            raise TrainingFailed(
                f"step {step.index + 1}: a loss or gradient norm is not finite; its prompts: {', '.join(names[:8])}; "
                "lower train.learningRate or critic.learningRate",
                reason="NotFinite",
                stage=self._config.stage,
            )
        return {
            "loss": loss,
            "value_loss": of_values,
            "clip_fraction": clipped,
            "value_clip_fraction": values_clipped,
            "gradient_norm": norm,
            "ratio_first": self._group.max(ratio) if first else 0.0,
        }
