"""Rollouts: prompts in, answers out, sampled from the policy's full distribution. Two samplers do it.

`rollout_transformers` asks the model in training itself; `rollout_vllm` asks an engine beside it, which is faster, has
to be given the weights of each step, and computes with other kernels, so that what it says is checked and corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trimtab_trainer.data.store import Row

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
    log_probs: NDArray[np.float32] | None = None
    """Of the actions, by the sampler at its temperature; None where the sampler is the model in training."""

    @property
    def actions(self) -> int:
        """Tokens of the answer."""
        return int(np.count_nonzero(self.row.loss_mask))


class Sampler(Protocol):
    """Answers prompts. Each draws from random numbers of its own, so no answer depends on its neighbours' prompts."""

    @property
    def foreign(self) -> bool:
        """Another program than the model in training samples: its episodes have log-probabilities, to be compared."""

    def sample(self, own: Sequence[Row], rows: int, stream: int, beat: Callable[[], None]) -> list[Episode]:
        """One answer to each prompt, from the weights as they are now. Collective.

        Args:
            own: this rank's part of the prompts; it may have none.
            rows: prompts of all ranks.
            stream: the step, or `HELD_OUT`; with seed and record it fixes the random numbers.
            beat: called now and then, so that long sampling is no hang.
        """


def random_key(seed: int, stream: int, prompt: Row) -> list[int]:
    """What a prompt's random numbers are drawn from; the same whatever the ranks and the neighbours."""
    return [_STREAM, seed, stream + 1, prompt.record_ids[0]]


def episode(
    prompt: Row, answer: NDArray[np.int32], end_id: int, log_probs: NDArray[np.float32] | None = None
) -> Episode:
    """The prompt with its answer, which is cut after the first end of turn."""
    ends = np.flatnonzero(answer == end_id)
    if len(ends):
        answer = answer[: ends[0] + 1]
    ids = np.concatenate([prompt.input_ids, answer])
    mask = np.arange(len(ids)) >= len(prompt.input_ids)
    log_probs = None if log_probs is None else log_probs[: len(answer)]
    return Episode(Row(ids, mask, [len(ids)], prompt.record_ids, prompt.labels), len(ends) > 0, log_probs)
