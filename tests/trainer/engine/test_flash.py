"""Variable-length attention as on a GPU: its layout and its check before use. The kernel itself runs on GPUs alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.trainer.engine.test_attention import batch, model_of, outputs
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trimtab_trainer.engine import attention, flash

CPU = torch.device("cpu")
LLAMA = flash._Shape(torch.float32, 2, 1, 16)


def documented(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: torch.Tensor, key_edges: torch.Tensor,
    longest: int, longest_key: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What torch says of `varlen_attn`, segment by segment: query [N, H, D], key and value [N, G, D]."""
    assert edges.dtype is key_edges.dtype is torch.int32
    assert torch.equal(edges, key_edges)
    assert longest == longest_key == int(edges.diff().max())
    assert int(edges[-1]) == len(query)
    found = []
    for start, stop in pairwise(edges.tolist()):
        q, k, v = (each[start:stop].transpose(0, 1) for each in (query, key, value))
        causal = window_size == (-1, 0)
        found.append(scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(found, dim=1).transpose(0, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The kernel in its documented form, allowed for the small Llama; counts its segments."""
    counted: list[int] = []

    def kernel(*tensors: Any, **settings: Any) -> torch.Tensor:
        counted.append(len(tensors[3]) - 1)
        return documented(*tensors, **settings)

    monkeypatch.setattr(flash, "varlen_attn", kernel)
    monkeypatch.setattr(flash, "_exact", {LLAMA})
    yield counted
    AttentionInterface.register("sdpa", attention.attention)


def test_s2_all_segments_in_one_call_equal_the_whole_square(calls: list[int]) -> None:
    model, given = model_of("llama"), batch()
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    expected = outputs(model, given)
    attention.install(model)
    found = outputs(model, given)
    assert len(calls) == 2, "one a layer"
    assert calls[0] >= 7, "the segments of three rows, and padding"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_window_that_is_shorter_than_a_segment_is_left_to_plain_attention(calls: list[int]) -> None:
    model, given = model_of("mistral"), batch()
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    expected = outputs(model, given)
    config = model.config
    flash._exact.add(
        flash._Shape(
            torch.float32,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim or config.hidden_size // config.num_attention_heads,
        )
    )
    attention.install(model)
    for ours, theirs in zip(outputs(model, given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not calls


@pytest.mark.parametrize("asked", [{"dropout": 0.1}, {"softcap": 50.0}, {"s_aux": torch.zeros(2)}])
def test_what_the_kernel_does_not_do_is_left_to_plain_attention(calls: list[int], asked: dict[str, Any]) -> None:
    query, key = torch.zeros(1, 2, 4, 16), torch.zeros(1, 1, 4, 16)
    assert flash.suits(query, key, {"dropout": 0.0, "softcap": None, "scaling": 0.25})
    assert not flash.suits(query, key, asked)
    assert not flash.suits(query.double(), key, {})


def test_a_kernel_is_used_only_where_outputs_and_gradients_are_those_of_plain_attention(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_rng_state()
    assert flash._is_exact(LLAMA, CPU)
    assert torch.equal(torch.get_rng_state(), before)

    def sees_what_comes(*tensors: Any, **settings: Any) -> torch.Tensor:
        return documented(*tensors, **{**settings, "window_size": (-1, -1)})

    def without_gradient(*tensors: Any, **settings: Any) -> torch.Tensor:
        found = documented(*tensors, **settings)
        return 2 * found.detach() - found

    for wrong in (sees_what_comes, without_gradient):
        caplog.clear()
        monkeypatch.setattr(flash, "varlen_attn", wrong)
        assert not flash._is_exact(LLAMA, CPU)
        assert "whole squares are computed instead" in caplog.text


def test_without_a_kernel_that_is_said_and_plain_attention_stays(caplog: pytest.LogCaptureFixture) -> None:
    assert not flash._is_exact(flash._Shape(torch.bfloat16, 2, 1, 16), CPU), "torch's own has none for a CPU"
    assert "no variable-length attention here" in caplog.text
