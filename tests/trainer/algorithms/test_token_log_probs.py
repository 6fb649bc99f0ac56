"""S7: log-probabilities chunk by chunk against whole logits in fp64, their sums in fp32, and what is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from trimtab_trainer.algorithms import token_log_probs as module
from trimtab_trainer.algorithms.causal_lm import entropy
from trimtab_trainer.algorithms.token_log_probs import LogitMap, token_log_probs

TOKENS, VOCABULARY, HIDDEN = 37, 53, 16
MAPS = {
    "plain": LogitMap(),
    "temperature": LogitMap(temperature=0.7),
    "scaled": LogitMap(scale=0.25, temperature=1.3),
    "capped": LogitMap(scale=1.5, cap=3.0, temperature=0.7),
}


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, logit_map: LogitMap) -> torch.Tensor:
    """As the architectures that do it write it."""
    logits = hidden @ weight.T * logit_map.scale
    if logit_map.cap is not None:
        logits = logit_map.cap * torch.tanh(logits / logit_map.cap)
    return logits / logit_map.temperature


def drawn(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, tokens, and what the log-probabilities are weighed with, each another."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, generator=generator).requires_grad_()
    tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, tokens, torch.randn(TOKENS, dtype=dtype, generator=generator)


@pytest.mark.parametrize("chunk", [1, 10, TOKENS, 1000])
@pytest.mark.parametrize("name", MAPS)
def test_s7_chunks_equal_whole_logits_in_fp64_forward_and_backward(name: str, chunk: int) -> None:
    hidden, weight, tokens, factors = drawn()
    found, entropies = token_log_probs(hidden, weight, tokens, MAPS[name], chunk)
    logits = logits_of(hidden, weight, MAPS[name])
    expected = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(entropies, -(log_probs.exp() * log_probs).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies.float(), entropy(logits), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad((found * factors).sum() + entropies.sum(), (hidden, weight)),
        torch.autograd.grad((expected * factors).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_frozen_head_or_frozen_states_get_no_gradient() -> None:
    for frozen in (0, 1):
        hidden, weight, tokens, _ = drawn()
        (hidden, weight)[frozen].requires_grad_(False)
        token_log_probs(hidden, weight, tokens, LogitMap(), 10)[0].sum().backward()
        assert (hidden, weight)[frozen].grad is None
        assert (hidden, weight)[1 - frozen].grad is not None


def test_no_tokens_have_gradients_of_zeros() -> None:
    hidden, weight, tokens, _ = drawn()
    found = token_log_probs(hidden[:0], weight, tokens[:0], LogitMap(), 10)
    assert found.shape == (2, 0)
    found[0].sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    hidden, weight, tokens, _ = drawn()
    loss = token_log_probs(hidden, weight, tokens, LogitMap(), 10)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def bf16_gradient(chunk: int) -> tuple[float, torch.Tensor]:
    """Of the mean loss of 100 steps' tokens in one pass: the relative error of W's gradient, and W's."""
    generator = torch.Generator().manual_seed(5)
    steps, tokens_a_step = 100, 32
    # states with a mean, as real ones have: their products with softmax add up in one direction
    hidden = (torch.randn(steps * tokens_a_step, 64, generator=generator) + 0.5).bfloat16()
    weight = (0.1 * torch.randn(256, 64, generator=generator)).bfloat16().requires_grad_()
    tokens = torch.randint(0, 256, (len(hidden),), generator=generator)
    (ours,) = torch.autograd.grad(-token_log_probs(hidden, weight, tokens, LogitMap(), chunk)[0].sum(), weight)
    exact = weight.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden.double() @ exact.T, tokens, reduction="sum")
    (theirs,) = torch.autograd.grad(loss, exact)
    return float((ours.double() - theirs).norm() / theirs.norm()), ours


def test_s7_gradients_of_bf16_weights_are_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    error, gradient = bf16_gradient(chunk=32)
    assert gradient.dtype is torch.bfloat16
    assert error < 4e-3, "one rounding to bf16, and those of the logits"
    monkeypatch.setattr(module, "_wide", lambda tensor: tensor.dtype)
    assert bf16_gradient(chunk=32)[0] > 4 * error, "sums in bf16 would show"


def test_s7_bf16_steps_follow_fp64_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of SGD on fp32 master weights: no bias adds up over the steps."""

    def final(dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(6)
        teacher = torch.randn(64, 32, generator=generator)
        master = torch.zeros(64, 32, dtype=torch.promote_types(dtype, torch.float32))
        for _ in range(100):
            hidden = (torch.randn(512, 32, generator=generator) + 0.5).bfloat16().float()
            tokens = torch.multinomial((hidden @ teacher.T).softmax(-1), 1, generator=generator).squeeze(1)
            weight = master.to(dtype, copy=True).requires_grad_()
            loss = -token_log_probs(hidden.to(dtype), weight, tokens, LogitMap(), 8)[0].mean()
            master -= torch.autograd.grad(loss, weight)[0].to(master.dtype)
        return master.double()

    exact = final(torch.float64)
    error = float((final(torch.bfloat16) - exact).norm() / exact.norm())
    monkeypatch.setattr(module, "_wide", lambda tensor: tensor.dtype)
    rounded = float((final(torch.bfloat16) - exact).norm() / exact.norm())
    assert error < 5e-3
    assert rounded > 3 * error


def peak_growth(run: Callable[[], None], trace: Path) -> int:
    """Bytes of tensors by which memory rises above what it is before, by torch's own account of each allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return max(event["Total Allocated"] for event in events) - events[0]["Total Allocated"] + events[0]["Bytes"]


def test_s7_the_logits_of_a_row_are_never_in_memory_at_once(tmp_path: Path) -> None:
    tokens, vocabulary, chunk = 2048, 16_384, 256
    hidden = torch.randn(tokens, 32).requires_grad_()
    weight = torch.randn(vocabulary, 32).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    logits = tokens * vocabulary * 4

    def chunked() -> None:
        token_log_probs(hidden, weight, targets, LogitMap(), chunk)[0].sum().backward()

    def whole() -> None:
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()

    assert peak_growth(whole, tmp_path / "whole.json") > 2 * logits
    gradients = (hidden.numel() + weight.numel()) * 4
    # two buffers of an eighth of the logits: a chunk's, and the terms of their sum
    assert peak_growth(chunked, tmp_path / "chunked.json") < logits / 4 + 3 * gradients
