"""Attention over packed rows that computes nothing between segments.

transformers isolates the segments of a row by a mask, and torch's attention computes the whole square of a row all the
same: for twenty segments twenty times what is needed. On a CPU each segment is a call of its own here. On a GPU
hundreds of small calls would cost more than they save; there all segments are one call (`flash`), where the GPU has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trimtab_trainer.engine import flash


@dataclass(frozen=True)
class Block:
    """Tokens [start, stop) of a row, which see each other only."""

    start: int
    stop: int
    mask: torch.Tensor | None
    """bool [1, 1, L, L]; None: each sees all before it."""


@dataclass(frozen=True)
class _Batch:
    """What a mask says."""

    rows: list[list[Block]]
    bounds: flash.Bounds | None
    """Where all blocks are segments, each token of which sees all before it."""


_known = WeakIdKeyDictionary()
"""A `_Batch` by mask: all layers of a forward pass share one."""


def install(model: PreTrainedModel) -> None:
    """Make it what `attn_implementation="sdpa"` means in this process; `model` is one that will use it."""
    AttentionInterface.register("sdpa", attention)
    flash.prepare(model)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' function for "sdpa": query, key and value [R, heads, T, D], mask bool [R, 1, T, T] or none."""
    in_one_call, on_cpu = flash.suits(query, key, settings), query.device.type == "cpu"
    batch = None
    if attention_mask is not None and (in_one_call or on_cpu) and _is_square(query, attention_mask):
        batch = _batch(attention_mask)
    if batch is not None and batch.bounds is not None and in_one_call:
        return flash.attend(query, key, value, batch.bounds, settings.get("scaling")), None
    if batch is None or not on_cpu:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return output, None
    rows = []
    for row, blocks in enumerate(batch.rows):
        parts = []
        for block in blocks:
            q, k, v = (each[row : row + 1, :, block.start : block.stop] for each in (query, key, value))
            parts.append(sdpa_attention_forward(module, q, k, v, block.mask, **settings)[0])
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def _is_square(query: torch.Tensor, mask: torch.Tensor) -> bool:
    """A mask for tokens that see tokens of the same pass: none of a cache, and the same for all heads."""
    if mask.dtype is not torch.bool:
        return False
    rows, _, length, _ = query.shape
    return mask.shape == (rows, 1, length, length)


def _batch(mask: torch.Tensor) -> _Batch:
    """`mask`: bool [R, 1, T, T]. Whatever is as large as the mask stays on its device."""
    if mask not in _known:
        rows = [_blocks_of_row(row) for row in mask[:, 0]]
        _known[mask] = _Batch(rows, _bounds(rows, mask.shape[-1], mask.device))
    found: _Batch = _known[mask]
    return found


def _bounds(rows: list[list[Block]], length: int, device: torch.device) -> flash.Bounds | None:
    if any(block.mask is not None for blocks in rows for block in blocks):
        return None
    edges = [i * length + block.start for i, blocks in enumerate(rows) for block in blocks]
    longest = max(block.stop - block.start for blocks in rows for block in blocks)
    return flash.Bounds(torch.tensor([*edges, len(rows) * length], dtype=torch.int32, device=device), longest)


def _blocks_of_row(mask: torch.Tensor) -> list[Block]:
    """`mask`: bool [T, T]. A block begins at t where no token from t on sees one before t, and none before t sees t."""
    length = len(mask)
    places = torch.arange(length, device=mask.device)
    # the first and the last token that each one sees; itself where it sees none
    sees = mask.view(torch.uint8)
    first = torch.where(mask.any(dim=1), sees.argmax(dim=1), places)
    last = torch.where(mask.any(dim=1), length - 1 - sees.flip(1).argmax(dim=1), places)
    earliest = first.flip(0).cummin(dim=0).values.flip(0)
    latest = torch.cat([places[:1] - 1, last.cummax(dim=0).values[:-1]])
    begins = (earliest >= places) & (latest < places)
    block = begins.cumsum(dim=0)
    is_causal = mask.equal((block[:, None] == block[None]).tril())
    bounds = pairwise([*torch.nonzero(begins).flatten().tolist(), length])
    return [Block(start, stop, None if is_causal else _mask_of_block(mask, start, stop)) for start, stop in bounds]


def _mask_of_block(mask: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
    own = mask[start:stop, start:stop]
    if own.equal(torch.ones_like(own).tril()):
        return None
    return own[None, None].clone()  # a view would keep the whole mask, and with it the entry in `_known`, alive
