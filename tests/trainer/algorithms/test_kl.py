"""KL estimators and the penalty's controller."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.algorithms.kl import kl_estimates, next_coefficient

POLICY = torch.tensor([0.3, -1.0, 0.8, 0.0])
REFERENCE = torch.tensor([-0.2, 0.4, 0.1, 0.9]).log_softmax(dim=0)


def test_p14_estimates_at_one_half() -> None:
    k1, k2, k3 = kl_estimates(torch.tensor([0.5]))
    assert [float(k1), float(k2), float(k3)] == pytest.approx([0.5, 0.125, 0.1065306597], abs=1e-7)


def test_p14_a_token_that_the_reference_finds_far_likelier_does_not_overflow() -> None:
    k3 = kl_estimates(torch.tensor([-100.0, 100.0])).k3
    assert k3.isfinite().all()
    assert float(k3[0]) == pytest.approx(math.expm1(20) - 100)
    assert float(k3[1]) == pytest.approx(99.0)


def test_p14_a_small_ratio_keeps_its_digits() -> None:
    assert float(kl_estimates(torch.tensor([1e-3])).k3) == pytest.approx(4.9983337e-7, rel=1e-3)


@given(st.floats(-1000, 1000, width=32))
def test_p14_k2_and_k3_are_never_negative(log_ratio: float) -> None:
    k1, k2, k3 = kl_estimates(torch.tensor([log_ratio]))
    assert float(k1) == pytest.approx(log_ratio)
    assert float(k2) >= 0
    assert float(k3) >= -1e-9


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_p14_k1_and_k3_have_the_expectation_of_the_divergence(estimator: str) -> None:
    policy = POLICY.log_softmax(dim=0)
    log_ratio = policy - REFERENCE
    divergence = (policy.exp() * log_ratio).sum()
    mean = (policy.exp() * getattr(kl_estimates(log_ratio), estimator)).sum()
    assert float(mean) == pytest.approx(float(divergence), rel=1e-5)


def expected_gradient(estimator: str) -> torch.Tensor:
    """Mean over tokens sampled from the policy of the gradient that the estimator has as a loss."""
    logits = POLICY.clone().requires_grad_()
    log_probs = logits.log_softmax(dim=0)
    losses = getattr(kl_estimates(log_probs - REFERENCE), estimator)
    (log_probs.detach().exp() * losses).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_p14_as_a_loss_only_k2_has_the_gradient_of_the_divergence() -> None:
    logits = POLICY.clone().requires_grad_()
    log_probs = logits.log_softmax(dim=0)
    (forward,) = torch.autograd.grad((log_probs.exp() * (log_probs - REFERENCE)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((REFERENCE.exp() * (REFERENCE - log_probs)).sum(), logits)
    torch.testing.assert_close(expected_gradient("k2"), forward)
    torch.testing.assert_close(expected_gradient("k3"), reverse)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4))


def test_p17_the_coefficient_moves_by_a_fifth_of_the_horizon_s_share_at_most() -> None:
    assert next_coefficient(0.2, kl=12, target=6, horizon=10000, episodes=256) == pytest.approx(0.201024)
    assert next_coefficient(0.2, kl=0, target=6, horizon=10000, episodes=256) == pytest.approx(0.198976)
    assert next_coefficient(0.2, kl=6.6, target=6, horizon=10000, episodes=256) == pytest.approx(0.200512)
    assert next_coefficient(0.2, kl=6, target=6, horizon=10000, episodes=256) == 0.2
