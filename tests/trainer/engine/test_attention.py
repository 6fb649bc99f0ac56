"""Attention segment by segment: transformers' own results, without what lies between segments."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from tests.trainer.engine.test_head import SIZES
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trimtab_trainer.data.store import Row
from trimtab_trainer.engine import attention
from trimtab_trainer.engine.batches import MicroBatch, collate

FAMILIES = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": None},
    "qwen3": {},
}
LENGTHS = [[9, 2, 7], [3, 1, 12], [5]]


@pytest.fixture(autouse=True)
def _restored() -> object:
    yield
    AttentionInterface.register("sdpa", attention.attention)


def model_of(model_type: str) -> PreTrainedModel:
    torch.manual_seed(4)
    keys = {**SIZES, **FAMILIES[model_type], "initializer_range": 0.3, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **keys)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def batch() -> MicroBatch:
    """Three rows of different segments; the last two end with padding."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(3, 60, sum(lengths)).astype(np.int32) for lengths in LENGTHS]
    rows = [Row(i, np.ones(len(i), bool), n, list(range(len(n)))) for i, n in zip(ids, LENGTHS, strict=True)]
    return collate(rows, padding_id=2)


def blocks_of(mask: torch.Tensor) -> list[list[attention.Block]]:
    return attention._batch(mask[None, None]).rows


def outputs(model: PreTrainedModel, given: MicroBatch) -> list[torch.Tensor]:
    logits = model(input_ids=given.input_ids, position_ids=given.position_ids, use_cache=False).logits
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]


@pytest.mark.parametrize("family", FAMILIES)
def test_s2_segment_by_segment_equals_the_whole_square(family: str) -> None:
    model, given = model_of(family), batch()
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    expected = outputs(model, given)
    attention.install(model)
    for ours, theirs in zip(outputs(model, given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_generation_with_padding_on_the_left_is_unchanged() -> None:
    model = model_of("mistral")
    ids = torch.arange(3, 15)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    attention.install(model)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_the_work_is_the_sum_of_the_segments_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    model, length, squares = model_of("llama"), 64, []
    attention.install(model)
    torchs_own = torch.nn.functional.scaled_dot_product_attention

    def counting(query: torch.Tensor, key: torch.Tensor, *others: object, **settings: object) -> torch.Tensor:
        squares.append(query.shape[2] * key.shape[2])
        return torchs_own(query, key, *others, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)

    def work(lengths: list[int]) -> int:
        squares.clear()
        row = Row(np.arange(3, 3 + length, dtype=np.int32) % 60, np.ones(length, bool), lengths, [0])
        given = collate([row], padding_id=2)
        model(input_ids=given.input_ids, position_ids=given.position_ids, use_cache=False)
        return sum(squares)

    assert work([length]) == 8 * work([length // 8] * 8) == 2 * length**2, "of two layers"


def test_a_mask_that_no_block_divides_is_left_whole() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2, 0] = mask[1, 0] = False
    (blocks,) = blocks_of(mask)
    assert [(block.start, block.stop) for block in blocks] == [(0, 4)], "the last token sees the first"
    backwards = torch.eye(4, dtype=torch.bool)
    backwards[0, 3] = True
    assert len(blocks_of(backwards)[0]) == 1, "the first sees the last"
    assert len(blocks_of(torch.eye(4, dtype=torch.bool))[0]) == 4


def test_what_is_known_of_a_mask_goes_with_it() -> None:
    model = model_of("mistral")
    attention.install(model)
    for _ in range(3):
        outputs(model, batch())
    gc.collect()
    assert len(attention._known) == 0
