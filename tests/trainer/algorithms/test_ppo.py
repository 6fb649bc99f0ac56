"""Rewards and losses of PPO: published vectors and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.algorithms.causal_lm import entropy
from trimtab_trainer.algorithms.ppo import missing_end_scores, policy_loss, token_rewards, value_loss

LOG_PROBS = torch.tensor([-1.0, -0.5, -2.0])
OLD = torch.tensor([-1.2, -0.5, -1.0])
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5])


def test_p3_the_penalty_is_on_each_action_and_the_score_on_the_last() -> None:
    log_probs = torch.tensor([[-1.0, -1.0, math.nan], [-1.0, -1.0, -1.0]])
    reference = log_probs - torch.tensor([0.1, 0.2, 0.3])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), log_probs, reference, mask, coefficient=0.02)
    expected = torch.tensor([[-0.002, 1.996, 0.0], [-0.002, -0.004, -1.006]])
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=0)


def test_p3_rewards_of_an_episode_add_up_to_score_less_penalty_and_carry_no_gradient() -> None:
    log_probs = torch.randn(4, 7, requires_grad=True)
    reference = torch.randn(4, 7)
    mask = torch.arange(7) < torch.tensor([[1], [3], [6], [7]])
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0])
    rewards = token_rewards(scores, log_probs, reference, mask, coefficient=0.1)
    kl = ((log_probs - reference) * mask).sum(dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), scores - 0.1 * kl.detach())
    assert not rewards.requires_grad


def test_p4_only_an_episode_without_its_end_gets_the_fixed_score() -> None:
    scores, ended = torch.tensor([0.7, 0.9]), torch.tensor([True, False])
    assert missing_end_scores(scores, ended, -1.0).tolist() == pytest.approx([0.7, -1.0])
    assert missing_end_scores(scores, ended, 0.0).tolist() == pytest.approx([0.7, 0.0])
    assert missing_end_scores(scores, ended, None).tolist() == pytest.approx([0.7, 0.9])


def test_p7_the_ratio_is_one_before_the_first_update() -> None:
    terms = policy_loss(OLD, OLD, ADVANTAGES, 0.2)
    assert terms.ratio.tolist() == [1.0, 1.0, 1.0]
    assert not terms.clipped.any()
    assert terms.losses.tolist() == (-ADVANTAGES).tolist()


def test_p8_micro_batches_add_up_to_the_minibatch() -> None:
    whole = policy_loss(LOG_PROBS, OLD, ADVANTAGES, 0.2).losses.sum() / 3
    parts = [
        policy_loss(LOG_PROBS[part], OLD[part], ADVANTAGES[part], 0.2).losses.sum() / 3
        for part in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_p9_the_policy_loss_is_clipped() -> None:
    terms = policy_loss(LOG_PROBS, OLD, ADVANTAGES, 0.2)
    assert float(terms.losses.mean()) == pytest.approx(-0.1279799069, abs=1e-7)
    assert terms.clipped.tolist() == [True, False, False]
    assert terms.ratio.tolist() == pytest.approx([math.exp(0.2), 1.0, math.exp(-1.0)])


@given(st.floats(-1, 1), st.floats(-2, 2), st.floats(0.05, 0.5))
def test_p9_the_gradient_stops_where_the_clip_binds(moved: float, advantage: float, clip_range: float) -> None:
    log_probs = torch.tensor([moved], requires_grad=True)
    terms = policy_loss(log_probs, torch.zeros(1), torch.tensor([advantage]), clip_range)
    terms.losses.sum().backward()
    ratio = math.exp(moved)
    gains = (advantage > 0 and ratio > 1 + clip_range) or (advantage < 0 and ratio < 1 - clip_range)
    assert log_probs.grad is not None
    if min(abs(ratio - 1 - clip_range), abs(ratio - 1 + clip_range)) > 1e-5 and abs(advantage) > 1e-5:
        assert bool(terms.clipped) == gains
        assert float(log_probs.grad) == (0 if gains else pytest.approx(-advantage * ratio, rel=1e-5))
    assert float(terms.losses.detach()) >= -advantage * ratio - 1e-5, "clipping never lowers the loss"


def test_p10_the_value_loss_is_clipped() -> None:
    values = torch.tensor([0.5, 0.1], requires_grad=True)
    terms = value_loss(values, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)
    assert float(terms.losses.detach().mean()) == pytest.approx(0.4625)
    assert terms.clipped.tolist() == [True, False]
    terms.losses.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 1.1])


def test_entropy_of_known_distributions() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, -1000.0, 0.0], [0.0, 0.0, -math.inf, -math.inf]])
    logits.requires_grad_()
    found = entropy(logits)
    assert found.tolist() == pytest.approx([math.log(4), 0.0, math.log(2)], abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
