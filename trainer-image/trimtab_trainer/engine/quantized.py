"""QLoRA (Dettmers et al. 2023): the frozen weights of the adapted layers in 4 bits, by bitsandbytes.

NF4: blocks of 64 weights share one scale; each weight is the nearest of 16 quantiles of the normal distribution. In
each pass a layer's weights become the stage's precision again, so activations, adapter and gradients are as without it.
The model that is trained, and merged at the end, is that of the rounded weights.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.lora_targets import require_bitsandbytes

BLOCK = 64
"""Weights that share a scale. bitsandbytes 0.50 unpacks rows that are no multiple of it wrongly on a CPU."""


def quantize(model: PreTrainedModel, targets: Collection[str]) -> None:
    """Replace the linear layers that are named `targets` by ones of 4 bits.

    Raises:
        BadConfiguration: bitsandbytes is not there, does not support the device, or a layer is no plain linear one.
    """
    require_bitsandbytes()
    bitsandbytes = import_module("bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in bitsandbytes.supported_torch_devices:
        raise BadConfiguration(f"lora.quantization: bitsandbytes does not support {device} here; remove quantization")
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in targets or module is model.get_output_embeddings():
            continue
        if not isinstance(module, nn.Linear):
            raise BadConfiguration(
                f"lora.quantization: {name} is a {type(module).__name__}, not a Linear; remove quantization, or name "
                "other lora.targets"
            )
        if module.in_features % BLOCK:
            raise BadConfiguration(
                f"lora.quantization: {name} has {module.in_features} inputs, no multiple of {BLOCK}, the weights that "
                "share a scale; remove quantization, or name other lora.targets"
            )
        model.set_submodule(name, _quantized(module, bitsandbytes))
    cast(Any, model).is_loaded_in_4bit = True  # peft asks for it


def _quantized(module: nn.Linear, bitsandbytes: Any) -> nn.Module:
    weight = module.weight.data
    made = bitsandbytes.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", blocksize=BLOCK, module=made
    )
    made.bias = module.bias
    # or a CPU with AVX512-BF16 would repack the weights at the first evaluation, and round their scales
    made.support_avx512bf16_for_cpu = False
    layer: nn.Module = made.to(weight.device)  # quantises
    return layer


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The weights that the model computes with: those of 4 bits unpacked, [out, in]."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    unpacked: torch.Tensor = import_module("bitsandbytes.functional").dequantize_4bit(parameter.data, state)
    return unpacked


def size(parameter: torch.Tensor) -> int:
    """How many weights a parameter has, however they are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
