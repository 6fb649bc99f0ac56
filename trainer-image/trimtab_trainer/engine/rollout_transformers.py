"""Sampling with transformers' own generation, from the model in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trimtab_trainer.data.store import Row
from trimtab_trainer.engine.batches import in_micro_batches
from trimtab_trainer.engine.rollout import Episode, episode, random_key
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.ppo_settings import Rollout


@dataclass(frozen=True)
class TransformersSampler:
    """Answers prompts in micro-batches; see `Sampler`."""

    engine: Engine
    rollout: Rollout
    seed: int
    end_id: int
    padding_id: int
    micro_batch_size: int
    world_size: int
    foreign: bool = False

    def sample(self, own: Sequence[Row], rows: int, stream: int, beat: Callable[[], None]) -> list[Episode]:
        """See `Sampler.sample`."""
        found: list[Episode] = []
        for prompts in in_micro_batches(own, rows, self.world_size, self.micro_batch_size):
            found += self._answer(prompts, stream)
            beat()
        return found

    @torch.no_grad()
    def _answer(self, prompts: Sequence[Row], stream: int) -> list[Episode]:
        """No prompts: the rank takes part in the others' passes."""
        ids = [prompt.input_ids for prompt in prompts] or [np.full(1, self.padding_id, dtype=np.int32)]
        longest = max(map(len, ids))
        tokens = torch.full((len(ids), longest), self.padding_id, dtype=torch.int64)
        mask = torch.zeros((len(ids), longest), dtype=torch.int64)
        for i, prompt in enumerate(ids):
            tokens[i, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[i, longest - len(prompt) :] = 1
        uniform = np.stack([self._uniform(stream, prompt) for prompt in prompts] or [self._uniform(stream, None)])
        device = self.engine.device
        draw = _Draw(torch.from_numpy(uniform).to(device), self.rollout.temperature)
        generated = self.engine.module.generate(  # type: ignore[operator]
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=self.rollout.max_new_tokens,
                do_sample=False,  # `_Draw` leaves one token to choose from
                eos_token_id=self.end_id,
                pad_token_id=self.padding_id,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([draw]),
            synced_gpus=self.engine.deepspeed.zero_optimization_stage() == 3,
        )
        answers = generated[:, longest:].cpu().numpy().astype(np.int32)
        return [episode(*each, self.end_id) for each in zip(prompts, answers[: len(prompts)], strict=True)]

    def _uniform(self, stream: int, prompt: Row | None) -> NDArray[np.float64]:
        if prompt is None:
            return np.zeros(self.rollout.max_new_tokens)
        return np.random.default_rng(random_key(self.seed, stream, prompt)).random(self.rollout.max_new_tokens)


class _Draw(LogitsProcessor):
    """Draws each row's next token by the inverse of its distribution function, and leaves only that one possible."""

    def __init__(self, uniform: torch.Tensor, temperature: float) -> None:
        """`uniform`: fp64 [R, T] in [0, 1), one for each row and step."""
        self._uniform, self._temperature, self._step = uniform, temperature, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores`: logits, fp32 [R, V]."""
        summed = (scores.double() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        at = self._uniform[:, self._step, None] * summed[:, -1:]
        self._step += 1
        token = torch.searchsorted(summed, at, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
