"""Packing and padding change no logit: each segment's logits are those it has alone; and what leaks is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab_trainer.data.store import Row
from trimtab_trainer.engine.batches import MicroBatch, collate
from trimtab_trainer.engine.networks import LanguageModel
from trimtab_trainer.engine.objectives import NextToken

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(request.param, **TINY, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def row(*segments: list[int]) -> Row:
    ids = np.array([token for segment in segments for token in segment], dtype=np.int32)
    mask = np.concatenate([np.arange(len(segment)) > 0 for segment in segments])
    return Row(ids, mask, [len(segment) for segment in segments], list(range(len(segments))))


def forward(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


A, B, C, D = [5, 9, 13, 2], [7, 7, 21], [30, 31, 32, 33, 34, 35], [40, 41]


@torch.no_grad()
def test_s2_packed_and_padded_logits_are_those_of_each_segment_alone(model: PreTrainedModel) -> None:
    logits = forward(model, collate([row(A, B), row(C, D, A), row(D)], padding_id=1))
    for i, segments in enumerate([(A, B), (C, D, A), (D,)]):
        start = 0
        for segment in segments:
            alone = model(input_ids=torch.tensor([segment]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[i, start : start + len(segment)], alone, atol=1e-5, rtol=1e-5)
            start += len(segment)


@torch.no_grad()
def test_s2_a_changed_document_moves_only_its_own_logits(model: PreTrainedModel) -> None:
    before = forward(model, collate([row(A, B, C)], padding_id=1))
    after = forward(model, collate([row([50, 51, 52, 53], B, C)], padding_id=1))
    assert (before[:, :4] - after[:, :4]).abs().max() > 0.1
    assert torch.equal(before[:, 4:], after[:, 4:])
    batch = collate([row(A, B, C)], padding_id=1)
    leaking = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)).logits
    assert (leaking[:, 4:] - before[:, 4:]).abs().max() > 0.1, "the usual call does leak: the check above can fail"


def test_s2_gradients_of_packed_rows_are_the_sum_of_those_of_each_segment_alone(model: PreTrainedModel) -> None:
    def gradients(batches: list[MicroBatch]) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            (-LanguageModel(model)(batch)[0].sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = gradients([collate([row(A, B), row(C, D)], padding_id=1)])
    alone = gradients([collate([row(segment)], padding_id=1) for segment in (A, B, C, D)])
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_s11_rows_are_padded_on_the_right_and_positions_count_from_each_segment_s_start() -> None:
    batch = collate([row(A, B), row(D)], padding_id=1)
    assert batch.input_ids.tolist() == [[*A, *B], [*D, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert not batch.loss_mask[1, 2:].any()


def test_s6_a_row_whose_labels_are_all_masked_has_no_loss_and_gradients_of_zero(model: PreTrainedModel) -> None:
    masked = replace(row(A, B), loss_mask=np.zeros(len(A) + len(B), dtype=np.bool_))
    model.zero_grad()
    batch = collate([masked], padding_id=1)
    loss = NextToken().sums(LanguageModel(model)(batch), batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters())


def test_a_micro_batch_without_rows_has_no_loss_and_gradients_of_zero(model: PreTrainedModel) -> None:
    model.zero_grad()
    batch = collate([], padding_id=1)
    loss = -LanguageModel(model)(batch)[0].sum()
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters())
