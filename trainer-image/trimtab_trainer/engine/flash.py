"""FlashAttention over packed rows: torch's variable-length form, which computes nothing between segments.

Torch has it for GPUs alone. So before a model trains on one, it is compared there with torch's plain attention, on a
few tokens with the model's heads and dtype; where the two differ, or this GPU has no such kernel, the plain one stays.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

_CAUSAL = (-1, 0)
_HALF = (torch.bfloat16, torch.float16)
_ROUNDING = 2e-2
"""Of the largest number, in bf16."""
_OTHERS = ("position_bias", "softcap", "s_aux")
"""What an architecture may ask of attention besides, and this form does not do."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bounds:
    """Segments of the rows of a batch, one row after the other."""

    edges: torch.Tensor
    """int32 [N + 1]: where each of the N segments begins, and where the last one ends."""
    longest: int
    """Tokens."""


@dataclass(frozen=True)
class _Shape:
    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int
    """Of a head."""


_exact: set[_Shape] = set()
"""For which it was compared, and is the same."""


def prepare(model: PreTrainedModel) -> None:
    """Compare it with plain attention for this model, where a GPU is present; outside of any forward pass."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or model.dtype not in _HALF or not torch.cuda.is_available():
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = _Shape(model.dtype, heads, getattr(config, "num_key_value_heads", None) or heads, size)
    if shape not in _exact and _is_exact(shape, torch.device("cuda", torch.cuda.current_device())):
        _exact.add(shape)


def suits(query: torch.Tensor, key: torch.Tensor, settings: dict[str, Any]) -> bool:
    """Whether it can take the place of plain attention in this call."""
    if settings.get("dropout") or any(settings.get(name) is not None for name in _OTHERS):
        return False
    return _Shape(query.dtype, query.shape[1], key.shape[1], query.shape[-1]) in _exact


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds, scaling: float | None
) -> torch.Tensor:
    """Causal attention within each segment, [R, T, H, D]; query [R, H, T, D], key and value [R, G, T, D]."""
    rows, heads, length, _ = query.shape
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    edges, longest, grouped = bounds.edges, bounds.longest, heads != key.shape[1]
    found: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        q, k, v, edges, edges, longest, longest, scale=scaling, window_size=_CAUSAL, enable_gqa=grouped
    )
    whole: torch.Tensor = found.unflatten(0, (rows, length))
    return whole


def _is_exact(shape: _Shape, device: torch.device) -> bool:
    """Outputs and gradients, of random numbers that take none from the process's generators."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 10]
    given = [
        torch.randn(1, heads, sum(lengths), shape.size, generator=generator).to(device, shape.dtype).requires_grad_()
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    ]
    edges = torch.tensor([0, 5, 6, 16], dtype=torch.int32, device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    mask = (segment[:, None] == segment[None]).tril()
    groups = shape.heads // shape.key_heads
    key, value = (each.repeat_interleave(groups, dim=1) for each in given[1:])
    plain = scaled_dot_product_attention(given[0], key, value, attn_mask=mask).transpose(1, 2)
    try:
        ours = attend(given[0], given[1], given[2], Bounds(edges, max(lengths)), None)
        pairs = zip(_with_gradients(ours, given), _with_gradients(plain, given), strict=True)
        largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    except RuntimeError as error:  # what torch raises for a GPU before Ampere, and for a build without the kernel
        _log.warning("no variable-length attention here (%s): whole squares of packed rows are computed", error)
        return False
    if not largest <= _ROUNDING:
        _log.warning("variable-length attention is off by %.2g here: whole squares are computed instead", largest)
    return largest <= _ROUNDING


def _with_gradients(output: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
    return [output.detach(), *torch.autograd.grad(output.square().sum(), given)]
