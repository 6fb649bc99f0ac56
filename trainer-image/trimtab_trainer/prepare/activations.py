"""What a forward and a backward pass keep in memory, counted and not computed: on fake tensors, which have no contents.

A formula would have to know what each architecture keeps for its backward pass: GPT-2's activation function keeps eight
tensors as wide as its feed-forward, Llama's three. So one row is put through the model itself, with one layer and with
two, and the bytes of all tensors that are alive are followed: what they differ by is a layer's, the rest is there once.
All weights count as trained; with an adapter it is less.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trimtab_trainer.settings import Precision

_DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
_log = logging.getLogger(__name__)
_VOCABULARY = 16
"""The embedding and the head are no part of what is counted."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one row."""

    layer: int
    """Of each layer, from its forward to its backward pass; with gradient checkpointing only what enters it."""
    rest: int
    """Of everything else at the peak; with gradient checkpointing one layer's own is among it."""

    def of(self, layers: int) -> int:
        """Bytes at the peak of a row's two passes."""
        return layers * self.layer + self.rest


class _Live(TorchDispatchMode):
    """Follows the bytes of the storages that operations make, until they are freed."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        """`known`: not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def count_activations(config: Mapping[str, Any], precision: Precision, row: int, *, checkpointing: bool) -> Activations:
    """Of one row of `row` tokens, of two documents.

    Args:
        config: the whole model configuration in Hugging Face's keys.
        precision: of weights and activations.
        row: tokens.
        checkpointing: gradient checkpointing.
    """
    try:
        one, two = (_peak(_small(config, layers), precision, row, checkpointing) for layers in (1, 2))
    except Exception as error:  # a model whose tensors' sizes depend on contents: experts that choose their tokens
        kind = config.get("model_type")
        _log.warning("%s: its activations can't be counted (%s); they are taken for Llama's", kind, error)
        return _as_llama(config, precision, row, checkpointing=checkpointing)
    return Activations(layer=two - one, rest=2 * one - two)


def _as_llama(config: Mapping[str, Any], precision: Precision, row: int, *, checkpointing: bool) -> Activations:
    """Bytes of a pre-norm layer with a gated feed-forward: 11 h + 2 k + 4 f elements a token, k = h."""
    width = 2 if precision is Precision.BF16 else 4
    hidden = int(config["hidden_size"])
    layer = row * width * (13 * hidden + 4 * int(config.get("intermediate_size") or 4 * hidden))
    entering = row * width * hidden
    return Activations(entering, layer + 3 * entering) if checkpointing else Activations(layer, 3 * entering)


def _small(config: Mapping[str, Any], layers: int) -> Any:
    from transformers import AutoConfig

    complete: Any = AutoConfig.for_model(**config)
    text = complete.get_text_config()
    text.num_hidden_layers = layers
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    text.vocab_size = _VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return complete


def _peak(config: Any, precision: Precision, row: int, checkpointing: bool) -> int:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config  # not typed
    with FakeTensorMode():
        model = build(config, dtype=_DTYPES[precision], attn_implementation="sdpa", trust_remote_code=False)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        gradients = [torch.empty_like(parameter) for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        ids = torch.zeros((1, row), dtype=torch.int64)
        positions = torch.cat([torch.arange(row - row // 2), torch.arange(row // 2)])[None]
        with _Live([*model.parameters(), *model.buffers(), *gradients]) as live:
            hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
            hidden.sum().backward()
        peak: int = live.peak
        return peak
