"""Log-probabilities of tokens from hidden states, chunk by chunk: the logits of all tokens never exist at once.

With x_i the hidden state before token y_i, W [V, h] the output head and f the map that a model puts after it,

    z_i = f(W x_i),   log p(y_i) = z_i[y_i] - logsumexp z_i,   dlog p(y_i) / dz_i = onehot(y_i) - softmax z_i.

A chunk's logits are computed in the forward pass and again in the backward pass (Chen et al. 2016), so between the two
one chunk's logits stay in memory: the last one's, where the backward pass begins. Logits, sums over the vocabulary and
the gradient of W are fp32 whatever the weights' dtype: a gradient added up in bf16 would lose whatever is below 1/256
of what is there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class LogitMap:
    """What comes after the head: z = (cap tanh(s u / cap) or s u) / T, for the head's product u."""

    scale: float = 1.0
    """s."""
    cap: float | None = None
    """Soft bound of the logits."""
    temperature: float = 1.0
    """T."""

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Logits, in the place of the products."""
        if self.cap is None:
            return products.mul_(self.scale / self.temperature)
        return products.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """dz/du of each logit: s (1 - (T z / cap)^2) / T, or s / T."""
        straight = self.scale / self.temperature
        if self.cap is None:
            return straight
        return (logits * (self.temperature / self.cap)).square_().neg_().add_(1).mul_(straight)


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, logit_map: LogitMap, chunk: int
) -> torch.Tensor:
    """Of each token, its log-probability and the entropy of the distribution that it is of, both in nats.

    Args:
        hidden: x, [N, h].
        weight: W, [V, h].
        tokens: y, int64 [N].
        logit_map: f.
        chunk: tokens whose logits are in memory at once.

    Returns:
        fp32 [2, N] (fp64 of fp64): log-probabilities, which have a gradient, and entropies, which have none.
    """
    log_probs, entropies = _TokenLogProbs.apply(hidden, weight, tokens, logit_map, chunk)  # type: ignore[no-untyped-call]
    return torch.stack([log_probs, entropies])


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, logit_map: LogitMap, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums, found, entropies = (hidden.new_empty(len(hidden), dtype=_wide(hidden)) for _ in range(3))
        logits = sums
        for part in _parts(len(hidden), chunk):
            del logits  # before the next ones are made
            logits = logit_map(_product(hidden[part], weight.T))
            largest = logits.amax(dim=-1, keepdim=True)
            terms = (logits - largest).exp_()
            total = terms.sum(dim=-1)
            sums[part] = total.log() + largest.squeeze(-1)
            found[part] = logits.gather(1, tokens[part, None]).squeeze(-1) - sums[part]
            entropies[part] = sums[part] - terms.mul_(logits).sum(dim=-1) / total
            del terms
        ctx.save_for_backward(hidden, weight, tokens, sums, logits)
        ctx.logit_map, ctx.chunk = logit_map, chunk
        ctx.mark_non_differentiable(entropies)
        return found, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, tokens, sums, last = ctx.saved_tensors
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=_wide(weight)) if wants_weight else None
        for part in reversed(_parts(len(hidden), ctx.chunk)):
            logits = last if part.stop == len(hidden) else ctx.logit_map(_product(hidden[part], weight.T))
            slope = ctx.logit_map.slope(logits)
            of_logits = logits.sub_(sums[part, None]).exp_().mul_(-gradient[part, None])
            of_logits.scatter_add_(1, tokens[part, None], gradient[part, None])
            of_products = of_logits.mul_(slope).to(weight.dtype)
            if of_hidden is not None:
                torch.mm(of_products, weight, out=of_hidden[part])
            if of_weight is not None:
                _add_product(of_weight, of_products.T, hidden[part])
            del logits, of_logits, of_products
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None, None, None


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A b, of at least fp32; on a GPU bf16 factors give what was summed in fp32, without rounding it to bf16 first."""
    if a.is_cuda and a.dtype is not _wide(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(_wide(a))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a b to the total."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b)
