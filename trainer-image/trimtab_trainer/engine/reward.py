"""A reward model: a scalar head on a language model's backbone, and an offset that makes good answers' mean 0.

Good answers are the stage's demonstrations; without any, the best ones of its data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trimtab_trainer.algorithms.reward import pool_last
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.engine.networks import Network
from trimtab_trainer.engine.rollout import Episode
from trimtab_trainer.errors import CorruptArtifact

OFFSET_FILE = "reward.json"


def add_head(folder: Path, seed: int, **loading: Any) -> PreTrainedModel:
    """The backbone of a language model with a new head, of standard deviation 1 / sqrt(h + 1) (Stiennon et al. 2020).

    Args:
        folder: the language model's.
        seed: the head is drawn from it, in fp32, the same on every rank.
        loading: for `from_pretrained`.
    """
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **loading)
    head = model.score.weight.data
    head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) / (head.shape[1] + 1) ** 0.5)
    scoring: PreTrainedModel = model
    return scoring


def add_zero_head(folder: Path, **loading: Any) -> PreTrainedModel:
    """The backbone of a language model with a head that scores every text 0 until it has learnt."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **loading)
    model.score.weight.data.zero_()
    scoring: PreTrainedModel = model
    return scoring


def write_offset(folder: Path, offset: float) -> None:
    """Write it beside the weights; a buffer of the model would be lost where others load it."""
    (folder / OFFSET_FILE).write_text(json.dumps({"offset": offset}) + "\n", encoding="utf-8")


def read_offset(folder: Path) -> float:
    """Of a verified artifact; raises `CorruptArtifact` where there is none."""
    try:
        return float(json.loads((folder / OFFSET_FILE).read_bytes())["offset"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{folder / OFFSET_FILE}: holds no offset; run the reward stage again") from error


class Reward(Protocol):
    """What scores answers."""

    def __call__(self, episodes: Sequence[Episode], batch: MicroBatch) -> torch.Tensor:
        """fp32 [E]: the score of each episode; `batch` has them side by side on the device, one a row."""


@dataclass(frozen=True)
class RewardModel:
    """Scores of a frozen reward model."""

    network: Network
    offset: float

    @torch.no_grad()
    def __call__(self, episodes: Sequence[Episode], batch: MicroBatch) -> torch.Tensor:
        """See `Reward`: the score of the last token less the offset."""
        return pool_last(self.network(batch), batch.segment_lengths) - self.offset
