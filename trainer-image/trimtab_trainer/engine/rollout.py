"""Sampling: prompts in, answers out, from the policy's full distribution, with transformers' own generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trimtab_trainer.data.store import Row
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.ppo_settings import Rollout

HELD_OUT = -1
"""The stream of prompts that no step trains on."""
_STREAM = 7
"""Sets these random numbers apart from those of rows and templates, which come from the same seed."""


@dataclass(frozen=True)
class Episode:
    """A prompt and the answer to it."""

    row: Row
    """Prompt and answer as one segment; the answer's tokens, the actions, bear loss."""
    ended: bool
    """The last action is the end of turn."""

    @property
    def actions(self) -> int:
        """Tokens of the answer."""
        return int(np.count_nonzero(self.row.loss_mask))


@dataclass(frozen=True)
class Sampler:
    """Answers prompts. Each draws from a generator of its own, so no answer depends on its neighbours or its rank."""

    engine: Engine
    rollout: Rollout
    seed: int
    end_id: int
    padding_id: int

    @torch.no_grad()
    def sample(self, prompts: Sequence[Row], stream: int) -> list[Episode]:
        """Collective. No prompts: the rank takes part and gets none.

        Args:
            prompts: one micro-batch.
            stream: the step, or `HELD_OUT`; with seed and record it fixes the random numbers.
        """
        ids = [prompt.input_ids for prompt in prompts] or [np.full(1, self.padding_id, dtype=np.int32)]
        longest = max(map(len, ids))
        tokens = torch.full((len(ids), longest), self.padding_id, dtype=torch.int64)
        mask = torch.zeros((len(ids), longest), dtype=torch.int64)
        for i, prompt in enumerate(ids):
            tokens[i, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[i, longest - len(prompt) :] = 1
        records = [prompt.record_ids[0] for prompt in prompts] or [0]
        uniform = np.stack([self._uniform(stream, record) for record in records])
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
            ),
            logits_processor=LogitsProcessorList([draw]),
            use_cache=True,
            synced_gpus=self.engine.deepspeed.zero_optimization_stage() == 3,
        )
        answers = generated[:, longest:].cpu().numpy().astype(np.int32)
        return [self._episode(*each) for each in zip(prompts, answers[: len(prompts)], strict=True)]

    def _uniform(self, stream: int, record: int) -> NDArray[np.float64]:
        generator = np.random.default_rng([_STREAM, self.seed, stream + 1, record])
        return generator.random(self.rollout.max_new_tokens)

    def _episode(self, prompt: Row, answer: NDArray[np.int32]) -> Episode:
        ends = np.flatnonzero(answer == self.end_id)
        if len(ends):
            answer = answer[: ends[0] + 1]
        ids = np.concatenate([prompt.input_ids, answer])
        mask = np.arange(len(ids)) >= len(prompt.input_ids)
        return Episode(Row(ids, mask, [len(ids)], prompt.record_ids, prompt.labels), len(ends) > 0)


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
