"""Weights for rollouts of another program."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.algorithms.importance import importance_weights, sequence_importance_weights


def test_p12_a_token_s_weight_is_its_ratio_cut_at_the_cap() -> None:
    trainer = torch.tensor([-1.0, -1.0, -1.0, -0.1], requires_grad=True)
    weights = importance_weights(trainer, torch.tensor([-1.0, -1.5, -0.5, -200.0]), cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-0.5), 2.0])
    assert not weights.requires_grad


def test_p12_a_sequence_s_weight_is_the_product_not_the_mean() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, False, False], [True, True, True, True]])
    trainer = torch.tensor([[-1.0, -1.0, -1.0, math.nan], [-2.0, -1.0, 9.0, 9.0], [-1.0] * 4])
    rollout = torch.tensor([[-1.1, -1.2, -1.1, -1.0], [-1.0, -1.5, 0.0, 0.0], [-100.0] * 4])
    weights = sequence_importance_weights(trainer, rollout, mask, cap=3.0)
    assert weights.tolist() == pytest.approx([math.exp(0.4), math.exp(-0.5), 3.0])


def test_p12_weights_undo_the_sampler_s_error() -> None:
    sampler = torch.tensor([0.1, 0.4, 0.2]).log_softmax(dim=0)
    trainer = torch.tensor([0.3, 0.1, 0.2]).log_softmax(dim=0)
    values = torch.tensor([1.0, -2.0, 5.0])
    weights = importance_weights(trainer, sampler, cap=10.0)
    torch.testing.assert_close((sampler.exp() * weights * values).sum(), (trainer.exp() * values).sum())


@given(st.lists(st.tuples(st.floats(-300, 0), st.floats(-300, 0)), min_size=1, max_size=5), st.floats(1, 10))
def test_p12_weights_are_finite_and_at_most_the_cap(pairs: list[tuple[float, float]], cap: float) -> None:
    trainer, rollout = torch.tensor(pairs).T[:, None]
    for weights in (
        importance_weights(trainer, rollout, cap),
        sequence_importance_weights(trainer, rollout, torch.ones_like(trainer, dtype=torch.bool), cap),
    ):
        assert weights.isfinite().all()
        assert (weights <= cap * 1.00001).all()
