"""Proximal policy optimisation: a step samples answers, scores them, and updates actor and critic on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence

from trimtab_trainer.algorithms.advantages import explained_variance, gae, moments, whiten
from trimtab_trainer.algorithms.kl import next_coefficient
from trimtab_trainer.algorithms.ppo import policy_loss, token_rewards, value_loss
from trimtab_trainer.algorithms.schedule import learning_rate
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import VALIDATION, PlanName, PreparedData
from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.engine.average import WeightAverage
from trimtab_trainer.engine.batches import Step
from trimtab_trainer.engine.checkpoint import Saved
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.early_stopping import HELD_OUT_SCORE
from trimtab_trainer.engine.experience import Experience, Judge, Models
from trimtab_trainer.engine.loop import StepResult, not_finite
from trimtab_trainer.engine.pretraining_mix import MixGradients
from trimtab_trainer.engine.rollout import HELD_OUT
from trimtab_trainer.engine.rollout_store import RolloutStore
from trimtab_trainer.errors import TrainingFailed
from trimtab_trainer.ppo_settings import Ppo

_SHOWN = 8
"""Prompts whose answers are written down each time."""
_COEFFICIENT = "kl_coefficient"
_MIX_LOSS, _MIX_ROW = "pretraining_loss", "pretraining_row"
_MEANS = ("loss", "value_loss", "clip_fraction", "value_clip_fraction")
"""Of an update's actions."""
_NORM = "gradient_norm"
_METRICS = (
    "value_loss",
    "score",
    "kl_sequence",
    _COEFFICIENT,
    "entropy",
    "clip_fraction",
    "value_clip_fraction",
    "explained_variance",
    "response_length",
    "ended_fraction",
    "ratio_first",
)


class PpoLoop:
    """Trains actor and critic on prompts; a row is a prompt, and a step samples one answer to each of its rows."""

    def __init__(
        self,
        models: Models,
        group: Group,
        prepared: PreparedData,
        config: TrainConfig,
        ppo: Ppo,
        rollouts: RolloutStore,
        told_to_stop: Callable[[], bool],
    ) -> None:
        self._models, self._group, self._prepared, self._config, self._ppo = models, group, prepared, config, ppo
        self._rollouts = rollouts
        self._judge = Judge(models, group, prepared, config, ppo.rollout)
        self._mix: MixGradients | None = None
        if ppo.pretraining_mix is not None:
            self._mix = MixGradients(models.actor, group, prepared, config, ppo.pretraining_mix)
        self.average = WeightAverage(models.actor, ppo.ema.decay) if ppo.ema else None
        self._told_to_stop = told_to_stop
        self._coefficient = ppo.kl.coefficient
        self._critic_recipe = config.recipe.model_copy(update={"learning_rate": ppo.critic.learning_rate})

    @property
    def metrics(self) -> tuple[str, ...]:
        """What a step tells besides its loss."""
        return (*_METRICS, *self._judge.metrics, *((_MIX_LOSS,) if self._mix else ()))

    @property
    def engines(self) -> dict[str, Saved]:
        """What a checkpoint holds, by name."""
        average = {"average": self.average} if self.average else {}
        return {"deepspeed": self._models.actor, "critic": self._models.critic, **average}

    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the result, on rank 0; an average takes the place of what was trained. Collective."""
        if self.average:
            self.average.take_over()
        return self._models.actor.weights()

    @property
    def state(self) -> dict[str, float]:
        """What is carried from step to step besides the engines."""
        return {_COEFFICIENT: self._coefficient, **({_MIX_ROW: self._mix.row} if self._mix else {})}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        self._coefficient = state[_COEFFICIENT]
        if self._mix:
            self._mix.row = int(state[_MIX_ROW])

    def step(self, step: Step) -> StepResult:
        """One rollout and its updates.

        Raises:
            TrainingFailed: a loss is not finite, or the policy has moved further than `kl.maximum`.
        """
        experience, sampling = self._rollouts.experience(step, lambda: self._sample(step))
        told = self._tell(experience) | sampling
        self._check_kl(step, told["kl_sequence"])
        self._advantages(experience)
        told |= {_COEFFICIENT: self._coefficient, "explained_variance": self._explained(experience)}
        rate = learning_rate(self._config.recipe, step.index, self._prepared.info.total_steps)
        updates = [
            self._update(self._part(experience, step, start, stop), stop - start, step, rate)
            for _ in range(self._ppo.passes)
            for start, stop in self._minibatches(step)
        ]
        told |= {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        told["ratio_first"] = updates[0]["ratio"]
        self._steer(told["kl_sequence"], step.stop - step.start)
        own_tokens = sum(len(each.episode.row.input_ids) for each in experience)
        tokens, stop_wanted = self._group.sum(own_tokens, float(self._told_to_stop()))
        metrics = {name: told[name] for name in self.metrics}
        return StepResult(told["loss"], told[_NORM], rate, int(tokens), stop_wanted > 0, metrics)

    def _sample(self, step: Step) -> tuple[list[Experience], dict[str, float]]:
        return self._judge.answer(step.epoch, step.start, step.stop, step.index), self._judge.told

    def validate(self, plan: PlanName, beat: Callable[[], None]) -> dict[str, float]:
        """Score, KL and more of sampled answers to held-out prompts, with the same random numbers each time.

        Args:
            plan: whose rows.
            beat: called after each micro-batch.
        """
        experience = self._judge.answer(plan, 0, self._prepared.rows(plan), HELD_OUT, beat)
        told = self._tell(experience)
        if self._models.held_out is not None:
            (total,) = self._group.sum(math.fsum(self._judge.held_out_scores(experience, beat)))
            told[HELD_OUT_SCORE] = total / self._prepared.rows(plan)
        return told

    def samples(self) -> list[dict[str, str | float]]:
        """Answers to the first held-out prompts, else to the first ones, by this rank; collective."""
        plan: PlanName = VALIDATION if self._prepared.info.has_validation else 0
        experience = self._judge.answer(plan, 0, min(_SHOWN, self._prepared.rows(plan)), HELD_OUT)
        tokenizer = load_tokenizer(self._prepared.tokenizer_folder)
        lines: list[dict[str, str | float]] = []
        for each in experience:
            row = each.episode.row
            prompt, answer = (str(tokenizer.decode(row.input_ids[row.loss_mask == side])) for side in (False, True))
            lines.append({"prompt": prompt, "answer": answer, "score": round(float(each.score), 6)})
        return lines

    def _tell(self, experience: Sequence[Experience]) -> dict[str, float]:
        """Means over all ranks' episodes; of the entropy, over their actions."""
        rows = [
            (
                1.0,
                float(each.score),
                float((each.log_probs - each.reference).sum()),
                float(each.entropy.sum()),
                each.episode.actions,
                each.episode.ended,
            )
            for each in experience
        ]
        own = [sum(column) for column in zip(*rows, strict=True)] or [0.0] * 6
        episodes, score, kl, entropies, actions, ended = self._group.sum(*own)
        return {
            "score": score / max(1, episodes),
            "kl_sequence": kl / max(1, episodes),
            "entropy": entropies / max(1, actions),
            "response_length": actions / max(1, episodes),
            "ended_fraction": ended / max(1, episodes),
        }

    def _check_kl(self, step: Step, kl: float) -> None:
        most = self._ppo.kl.maximum
        if most is not None and kl > most:
            raise TrainingFailed(
                f"step {step.index + 1}: the policy is {kl:.3g} nats a sequence away from its starting weights, more "
                f"than kl.maximum = {most:g}; raise kl.coefficient or lower train.learningRate",
                reason="KlTooLarge",
                stage=self._config.stage,
            )

    def _steer(self, kl: float, episodes: int) -> None:
        """The next step's coefficient."""
        settings = self._ppo.kl
        if settings.target is not None:
            self._coefficient = next_coefficient(self._coefficient, kl, settings.target, settings.horizon, episodes)

    def _advantages(self, experience: Sequence[Experience]) -> None:
        """Fill in advantages, whitened over all ranks' actions, and returns."""
        device = self._models.actor.device
        mask = torch.zeros(0, 1, dtype=torch.bool, device=device)
        advantages = returns = torch.zeros(0, 1, device=device)
        if experience:
            scores = torch.stack([each.score for each in experience])
            log_probs, reference, values = (
                pad_sequence(list(parts), batch_first=True)
                for parts in zip(*((each.log_probs, each.reference, each.values) for each in experience), strict=True)
            )
            lengths = torch.tensor([each.episode.actions for each in experience], device=device)
            mask = torch.arange(log_probs.shape[1], device=device)[None] < lengths[:, None]
            rewards = token_rewards(scores, log_probs, reference, mask, self._coefficient)
            advantages, returns = gae(rewards, values, mask, self._ppo.discount, self._ppo.gae_lambda)
        whitened = whiten(advantages, mask, self._sum(moments(advantages, mask)))
        for i, each in enumerate(experience):
            each.advantages, each.returns = (part[i, : each.episode.actions] for part in (whitened, returns))

    def _explained(self, experience: Sequence[Experience]) -> float:
        """Share of the returns' variance, over all ranks, that the critic explains."""
        returns = self._joined([each.returns for each in experience])
        errors = returns - self._joined([each.values for each in experience])
        everything = torch.ones_like(returns, dtype=torch.bool)
        return explained_variance(*(self._sum(moments(each, everything)) for each in (returns, errors)))

    def _sum(self, local: torch.Tensor) -> torch.Tensor:
        """Over all ranks, fp64."""
        return torch.tensor(self._group.sum(*local), dtype=torch.float64, device=self._models.actor.device)

    def _joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """fp32 [N], of no parts as well."""
        return torch.cat([torch.zeros(0, device=self._models.actor.device), *parts])

    def _minibatches(self, step: Step) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) of each; the same at any number of ranks."""
        rows = step.stop - step.start
        parts = min(self._ppo.minibatches, rows)
        return pairwise(step.start + rows * part // parts for part in range(parts + 1))

    def _part(self, experience: Sequence[Experience], step: Step, start: int, stop: int) -> Sequence[Experience]:
        """This rank's episodes of the rows [start, stop): it has every size-th row of the step."""
        first, last = (-(-(row - step.start - self._group.rank) // self._group.size) for row in (start, stop))
        return experience[max(0, first) : max(0, last)]

    def _update(self, part: Sequence[Experience], rows: int, step: Step, rate: float) -> dict[str, float]:
        """One update of actor and critic: means over all ranks' actions, the largest |ratio - 1|, and more."""
        actor, critic = self._models.actor, self._models.critic
        (actions,) = self._group.sum(sum(each.episode.actions for each in part))
        scale = self._group.size / max(1.0, actions)
        totals = torch.zeros(4, dtype=torch.float64, device=actor.device)
        ratio = 0.0
        for chunk in self._judge.micro_batches(part, rows):
            batch = self._judge.collate([each.episode for each in chunk])
            log_probs, _ = actor.outputs(batch)
            old = self._joined([each.log_probs for each in chunk])
            advantages = self._joined([each.advantages for each in chunk])
            policy = policy_loss(log_probs, old, advantages, self._ppo.clip_range)
            losses = policy.losses * self._joined([each.weights for each in chunk])
            actor.backward(losses.sum() * scale)
            values = self._judge.values(critic.outputs(batch), batch)
            old_values = self._joined([each.values for each in chunk])
            returns = self._joined([each.returns for each in chunk])
            value = value_loss(values, old_values, returns, self._ppo.value_clip_range)
            critic.backward(value.losses.sum() * scale)
            terms = (losses, value.losses, policy.clipped, value.clipped)
            totals += torch.stack([term.detach().double().sum() for term in terms])
            ratio = max([ratio, *(policy.ratio - 1).abs().tolist()])
        means = [total / max(1.0, actions) for total in self._group.sum(*totals)]
        self._require_finite(step, loss=means[0], value_loss=means[1])
        told = dict(zip(_MEANS, means, strict=True)) | {"ratio": self._group.max(ratio)}
        if self._mix:
            told[_MIX_LOSS] = self._mix.add(step)
        told[_NORM] = actor.step(rate)
        if self.average:
            self.average.update()
        critic_rate = learning_rate(self._critic_recipe, step.index, self._prepared.info.total_steps)
        self._require_finite(step, gradient_norm=told[_NORM], critic_gradient_norm=critic.step(critic_rate))
        return told

    def _require_finite(self, step: Step, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                what = f"the {name.replace('_', ' ')} is {value}"
                remedy = "lower train.learningRate or ppo.critic.learningRate"
                raise not_finite(self._prepared, step, what, remedy, self._config.stage)
