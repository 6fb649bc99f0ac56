"""The output head of a language model: log-probabilities from hidden states without the logits of a whole row."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import deepspeed
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trimtab_trainer.algorithms.token_log_probs import LogitMap, token_log_probs
from trimtab_trainer.chunks import tokens_of_chunk

_PROBED_LOGIT = 64
"""The largest logit of the probe: large enough for any soft cap to show."""
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the largest logit."""

_log = logging.getLogger(__name__)


class Head(nn.Module):
    """The head of a model that stays where it is: a module of its own so that ZeRO 3 gathers the weight once a pass."""

    def __init__(self, head: nn.Linear, logit_map: LogitMap) -> None:
        super().__init__()
        self._shared = (head,)  # in a tuple: the parameter keeps its one name
        self._map = logit_map
        deepspeed.zero.register_external_parameter(self, head.weight)

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        """See `token_log_probs`."""
        weight = self._shared[0].weight
        chunk = tokens_of_chunk(weight.shape[0], on_accelerator=hidden.is_cuda)
        return token_log_probs(hidden, weight, tokens, replace(self._map, temperature=temperature), chunk)


def find_head(model: PreTrainedModel) -> Head | None:
    """The model's head, where it is a matrix and a known map; None, with a line in the log, where it is not.

    transformers has no name for what an architecture does to its logits. So the keys of the configuration that tell it
    are read, and what follows is compared with the logits that the model gives.
    """
    head = model.get_output_embeddings()
    logit_map = _configured(model.config)
    if type(head) is nn.Linear and getattr(head, "bias", None) is None and _is_exact(model, head, logit_map):
        return Head(head, logit_map)
    _log.warning(
        "%s: what this architecture does to its logits is not known here; the logits of whole rows are kept in memory",
        model.config.model_type,
    )
    return None


def _configured(config: PretrainedConfig) -> LogitMap:
    """By the keys of Granite, Cohere and Gemma."""
    text = config.get_text_config()
    scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    return LogitMap(scale, getattr(text, "final_logit_softcapping", None))


@torch.no_grad()
def _is_exact(model: PreTrainedModel, head: nn.Linear, logit_map: LogitMap) -> bool:
    """Compare on a few tokens, whose hidden states are stretched until the logits are as large as a trained model's."""
    ids = (torch.arange(8, device=head.weight.device) * 7 % head.weight.shape[0])[None]
    positions = torch.arange(8, device=ids.device)[None]
    training = model.training
    model.eval()
    hidden = hidden_states(model, ids, positions)
    largest = float(head(hidden).abs().max())
    factor = 2.0 ** round(math.log2(_PROBED_LOGIT / largest)) if largest > 0 else 1.0
    expected = logit_map(head(hidden * factor).float())
    hook = head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * factor,))
    try:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    finally:
        hook.remove()
        model.train(training)
    moved = float((logits - expected).abs().max())
    return moved <= _ROUNDING[model.dtype] * float(expected.abs().max())


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """What the head takes, [R, T, h]."""
    hidden: torch.Tensor = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
    return hidden
