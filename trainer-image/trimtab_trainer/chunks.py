"""How many tokens' logits are in memory at once: the engine keeps to it, and the estimate counts with it."""

from __future__ import annotations

CPU_BYTES, ACCELERATOR_BYTES = 1 << 26, 1 << 29
"""Of fp32 logits; on an accelerator smaller products would leave it idle."""


def tokens_of_chunk(vocabulary: int, *, on_accelerator: bool) -> int:
    """Tokens whose logits are computed together.

    >>> tokens_of_chunk(32_768, on_accelerator=False)
    512
    """
    return max(1, (ACCELERATOR_BYTES if on_accelerator else CPU_BYTES) // (4 * vocabulary))
