"""Rewards without a model: a program judges the text of each answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab_trainer.algorithms.verifier import build_check
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.engine.rollout import Episode
from trimtab_trainer.verifier_settings import Verifier


class VerifiedReward:
    """1 for an answer that is right, 0 for one that is not."""

    def __init__(self, verifier: Verifier, prepared: PreparedData) -> None:
        self._check = build_check(verifier)
        self._references = prepared.references
        self._tokenizer = load_tokenizer(prepared.tokenizer_folder)

    def __call__(self, episodes: Sequence[Episode], batch: MicroBatch) -> torch.Tensor:
        """See `Reward`."""
        right = [self._check(self._text(each), self._references[each.row.record_ids[0]]) for each in episodes]
        return torch.tensor(right, dtype=torch.float32, device=batch.input_ids.device)

    def _text(self, episode: Episode) -> str:
        """The answer without its end of turn. Other control tokens are text: they were not to be written."""
        ids = episode.row.input_ids[episode.row.loss_mask].tolist()
        return str(self._tokenizer.decode(ids[: len(ids) - episode.ended], clean_up_tokenization_spaces=False))
