"""What an engine trains: a transformers model, and what it answers for a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab_trainer.algorithms.causal_lm import logit_log_probs
from trimtab_trainer.engine import attention
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.engine.head import find_head, hidden_states


class Network(nn.Module):
    """A model with one forward pass from a batch to what the stage's objective takes.

    There is no attention mask: segments are isolated by `position_ids`, which restart at 0.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        attention.install(model)
        self.model = model

    @abstractmethod
    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Of a micro-batch on the model's device."""


class LanguageModel(Network):
    """Of the N loss-bearing tokens: log-probabilities, and entropies without a gradient, in nats; fp32 [2, N]."""

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0) -> None:
        """`temperature`: what the logits are divided by."""
        super().__init__(model)
        self.head = find_head(model)
        self.temperature = temperature

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """See `Network`."""
        bears_loss = batch.loss_mask[:, 1:]
        tokens = batch.input_ids[:, 1:][bears_loss]
        if self.head is None:
            logits = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            return logit_log_probs(logits[:, :-1][bears_loss], tokens, self.temperature)
        hidden = hidden_states(self.model, batch.input_ids, batch.position_ids)
        found: torch.Tensor = self.head(hidden[:, :-1][bears_loss], tokens, self.temperature)
        return found


@contextmanager
def at_temperature(network: Network, temperature: float) -> Iterator[None]:
    """Forward passes of a language model at another temperature than its own."""
    if not isinstance(network, LanguageModel):
        raise TypeError(f"{type(network).__name__} has no temperature")
    own, network.temperature = network.temperature, temperature
    try:
        yield
    finally:
        network.temperature = own


class Scorer(Network):
    """A score for each token, fp32 [R, T]: that of the text up to it. `model` is one for sequence classification."""

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """See `Network`.

        transformers' own forward pass would pool the last token that is no padding token by its id, and so the wrong
        one where a text ends with that token; which token counts is the caller's to say (`pool_last`).
        """
        hidden = hidden_states(self.model, batch.input_ids, batch.position_ids)
        scores: torch.Tensor = cast(nn.Module, self.model.score)(hidden)
        return scores.squeeze(-1).float()
