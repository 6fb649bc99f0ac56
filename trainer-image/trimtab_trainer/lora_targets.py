"""Which layers of a model LoRA adapts: by default every linear layer of the blocks, whatever the family calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.settings import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_bitsandbytes() -> None:
    """Raise `BadConfiguration` where the package that `lora.quantization` needs is not installed."""
    if find_spec("bitsandbytes") is None:
        raise BadConfiguration(
            "lora.quantization: nf4 needs the package bitsandbytes, which the trainer's image does not have; use an "
            "image with it, or remove quantization"
        )


def linear_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Inputs plus outputs of the linear layers, summed by the last part of their names; without the heads.

    LoRA of rank r adds r times such a sum of parameters.
    """
    return _summed(model, sum)


def linear_weights(model: PreTrainedModel) -> dict[str, int]:
    """Weights of the same layers, summed alike."""
    return _summed(model, math.prod)


def _summed(model: PreTrainedModel, measure: Callable[[Sequence[int]], int]) -> dict[str, int]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module not in heads:
            last = name.rpartition(".")[2]
            found[last] = found.get(last, 0) + measure(module.weight.shape)
    return found


def choose_targets(lora: Lora, available: Collection[str]) -> list[str]:
    """The names to adapt, in the alphabet's order.

    Raises:
        BadConfiguration: a named layer is not among those that the model has.
    """
    chosen = sorted(available) if lora.targets is None else sorted({*lora.targets})
    if missing := [name for name in chosen if name not in available]:
        raise BadConfiguration(
            f"lora.targets: the model's blocks have no linear layer named {', '.join(missing)}; "
            f"they have {', '.join(sorted(available)) or 'none'}"
        )
    return chosen
