"""What an engine trains: a transformers model, and what it answers for a batch."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel


class Network(nn.Module):
    """A model with one forward pass from ids to what the stage's objective takes.

    It takes `input_ids` and `position_ids`, both int64 [R, T]. There is no attention mask: segments are isolated by
    `position_ids`, which restart at 0.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


class LanguageModel(Network):
    """Logits of the next token, [R, T, V]."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        logits: torch.Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits


class Scorer(Network):
    """A score for each token, fp32 [R, T]: that of the text up to it. `model` is one for sequence classification."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """See `Network`.

        transformers' own forward pass would pool the last token that is no padding token by its id, and so the wrong
        one where a text ends with that token; which token counts is the caller's to say (`pool_last`).
        """
        hidden = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        scores: torch.Tensor = cast(nn.Module, self.model.score)(hidden)
        return scores.squeeze(-1).float()
