"""Attention over packed rows that computes nothing between segments.

transformers isolates the segments of a row by a mask, and torch's attention on a CPU computes the whole square of a row
all the same: for twenty segments twenty times what is needed. Here each segment is a call of its own. On a GPU hundreds
of small calls would cost more than they save, so it keeps transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True)
class Block:
    """Tokens [start, stop) of a row, which see each other only."""

    start: int
    stop: int
    mask: torch.Tensor | None
    """bool [1, 1, L, L]; None: each sees all before it."""


_known = WeakIdKeyDictionary()
"""Blocks of each row by mask: all layers of a forward pass share one."""


def install() -> None:
    """Make it what `attn_implementation="sdpa"` means in this process, on CPUs."""
    AttentionInterface.register("sdpa", attention)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' function for "sdpa": query, key and value [R, heads, T, D], mask bool [R, 1, T, T] or none."""
    if attention_mask is None or not _is_square(query, attention_mask):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return output, None
    rows = []
    for row, blocks in enumerate(_blocks(attention_mask)):
        parts = []
        for block in blocks:
            q, k, v = (each[row : row + 1, :, block.start : block.stop] for each in (query, key, value))
            parts.append(sdpa_attention_forward(module, q, k, v, block.mask, **settings)[0])
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def _is_square(query: torch.Tensor, mask: torch.Tensor) -> bool:
    """A mask for tokens that see tokens of the same pass: none of a cache, and the same for all heads."""
    if mask.dtype is not torch.bool or query.device.type != "cpu":
        return False
    rows, _, length, _ = query.shape
    return mask.shape == (rows, 1, length, length)


def _blocks(mask: torch.Tensor) -> list[list[Block]]:
    if mask not in _known:
        _known[mask] = [_blocks_of_row(row) for row in mask[:, 0]]
    found: list[list[Block]] = _known[mask]
    return found


def _blocks_of_row(mask: torch.Tensor) -> list[Block]:
    """`mask`: bool [T, T]. A block begins at t where no token from t on sees one before t, and none before t sees t."""
    length = len(mask)
    places = torch.arange(length)
    # the first and the last token that each one sees; itself where it sees none
    first = torch.where(mask.any(dim=1), mask.int().argmax(dim=1), places)
    last = torch.where(mask.any(dim=1), length - 1 - mask.flip(1).int().argmax(dim=1), places)
    earliest = first.flip(0).cummin(dim=0).values.flip(0)
    latest = torch.cat([torch.tensor([-1]), last.cummax(dim=0).values[:-1]])
    starts = torch.nonzero((earliest >= places) & (latest < places)).flatten().tolist()
    return [_block(mask, start, stop) for start, stop in pairwise([*starts, length])]


def _block(mask: torch.Tensor, start: int, stop: int) -> Block:
    own = mask[start:stop, start:stop]
    is_causal = own.equal(torch.ones_like(own).tril())
    # a copy: a view would keep the whole mask, and with it this entry, alive
    return Block(start, stop, None if is_causal else own[None, None].clone())
