"""PPO's rewards, advantages and losses against verl, OpenRLHF and TRL 1.12."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from trl.trainer.utils import entropy_from_logits

from trimtab_trainer.algorithms.advantages import gae, moments, whiten
from trimtab_trainer.algorithms.causal_lm import entropy
from trimtab_trainer.algorithms.importance import importance_weights, sequence_importance_weights
from trimtab_trainer.algorithms.kl import kl_estimates, next_coefficient
from trimtab_trainer.algorithms.ppo import policy_loss, token_rewards, value_loss

same = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
CLIP = 0.2


@pytest.fixture
def episodes() -> SimpleNamespace:
    """Log-probabilities, values and rewards, fp32 [R, T]; rows of different length."""
    mask = torch.arange(9) < torch.tensor([[9], [1], [4], [7], [6]])
    old = -torch.rand(5, 9) - 0.1
    return SimpleNamespace(
        mask=mask,
        old=old,
        log_probs=old + 0.3 * torch.randn(5, 9),
        reference=old + 0.4 * torch.randn(5, 9),
        values=torch.randn(5, 9),
        rewards=torch.randn(5, 9),
        advantages=torch.randn(5, 9),
        returns=torch.randn(5, 9),
        scores=torch.randn(5),
    )


def test_token_rewards(verl_ppo: ModuleType, openrlhf_utils: ModuleType, episodes: SimpleNamespace) -> None:
    mask = episodes.mask
    ours = token_rewards(episodes.scores, episodes.log_probs, episodes.reference, mask, 0.05)
    kl = (episodes.log_probs - episodes.reference) * mask
    same(openrlhf_utils.compute_reward(episodes.scores, 0.05, kl, mask), ours)
    scores = torch.zeros(5, 9)
    scores[torch.arange(5), mask.sum(dim=1) - 1] = episodes.scores
    verl = verl_ppo.compute_rewards(scores, episodes.log_probs, episodes.reference, 0.05)
    same(verl[mask], ours[mask])


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.5)])
def test_advantages_and_returns(
    verl_ppo: ModuleType, episodes: SimpleNamespace, discount: float, gae_lambda: float
) -> None:
    mask = episodes.mask
    advantages, returns = gae(episodes.rewards, episodes.values, mask, discount, gae_lambda)
    whitened, theirs = verl_ppo.compute_gae_advantage_return(
        episodes.rewards, episodes.values, mask.float(), discount, gae_lambda
    )
    same(theirs[mask], returns[mask])
    ours = whiten(advantages, mask, moments(advantages, mask))
    count = int(mask.sum())
    same(whitened[mask], ours[mask] * math.sqrt((count - 1) / count))


def test_whitening(trl_ppo: ModuleType, openrlhf_utils: ModuleType, episodes: SimpleNamespace) -> None:
    mask = episodes.mask
    ours = whiten(episodes.advantages, mask, moments(episodes.advantages, mask))
    count = int(mask.sum())
    unbiased = trl_ppo.masked_whiten(episodes.advantages, mask)
    same(unbiased[mask], ours[mask] * math.sqrt((count - 1) / count))
    biased = openrlhf_utils.masked_normalize(episodes.advantages.view(1, -1), mask.view(1, -1))
    same(biased.view(5, 9), ours)


def test_policy_loss(verl_ppo: ModuleType, openrlhf_loss: ModuleType, episodes: SimpleNamespace) -> None:
    mask = episodes.mask
    log_probs = episodes.log_probs.requires_grad_()
    terms = policy_loss(log_probs[mask], episodes.old[mask], episodes.advantages[mask], CLIP)
    assert 0 < terms.clipped.sum() < mask.sum()
    loss, fraction = terms.losses.mean(), terms.clipped.float().mean()
    (gradient,) = torch.autograd.grad(loss, log_probs)

    theirs, their_fraction, *_ = openrlhf_loss.PolicyLoss(CLIP, CLIP)(
        log_probs, episodes.old, episodes.advantages, mask
    )
    same(theirs, loss)
    same(their_fraction, fraction)
    same(torch.autograd.grad(theirs, log_probs)[0], gradient)

    # Dual clip is beyond the paper: a bound that no ratio here reaches.
    config = SimpleNamespace(clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, global_batch_info={})
    config.get = lambda name, default: 1e6 if name == "clip_ratio_c" else default
    theirs, metrics = verl_ppo.compute_policy_loss_vanilla(
        episodes.old, log_probs, episodes.advantages, mask, config=config
    )
    same(theirs, loss)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(fraction))
    same(torch.autograd.grad(theirs, log_probs)[0], gradient)


def test_value_loss(verl_ppo: ModuleType, openrlhf_loss: ModuleType, episodes: SimpleNamespace) -> None:
    mask = episodes.mask
    values = (episodes.values + 0.4 * torch.randn(5, 9)).requires_grad_()
    terms = value_loss(values[mask], episodes.values[mask], episodes.returns[mask], CLIP)
    assert 0 < terms.clipped.sum() < mask.sum()
    loss = terms.losses.mean()
    (gradient,) = torch.autograd.grad(loss, values)
    theirs = openrlhf_loss.ValueLoss(CLIP)(values, episodes.values, episodes.returns, mask)
    same(theirs, loss)
    same(torch.autograd.grad(theirs, values)[0], gradient)
    theirs, fraction = verl_ppo.compute_value_loss(values, episodes.returns, episodes.values, mask, CLIP)
    same(theirs, loss)
    same(fraction, terms.clipped.float().mean())
    same(torch.autograd.grad(theirs, values)[0], gradient)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence(
    verl_ppo: ModuleType, openrlhf_utils: ModuleType, episodes: SimpleNamespace, estimator: str
) -> None:
    ours = getattr(kl_estimates(episodes.log_probs - episodes.reference), estimator)
    same(verl_ppo.kl_penalty(episodes.log_probs, episodes.reference, estimator), ours)
    same(openrlhf_utils.compute_approx_kl(episodes.log_probs, episodes.reference, kl_estimator=estimator), ours)


def test_the_gradient_that_others_put_behind_k3_is_that_of_k2(verl_ppo: ModuleType, episodes: SimpleNamespace) -> None:
    log_probs = episodes.log_probs.requires_grad_()
    straight = verl_ppo.kl_penalty(log_probs, episodes.reference, "k3+")
    estimates = kl_estimates(log_probs - episodes.reference)
    same(straight, estimates.k3)
    (theirs,) = torch.autograd.grad(straight.sum(), log_probs)
    same(theirs, torch.autograd.grad(estimates.k2.sum(), log_probs)[0])


@pytest.mark.parametrize("kl", [0.0, 5.5, 6.3, 12.0])
def test_adaptive_coefficient(verl_ppo: ModuleType, kl: float) -> None:
    controller = verl_ppo.AdaptiveKLController(0.2, target_kl=6, horizon=10000)
    controller.update(kl, 256)
    assert next_coefficient(0.2, kl, 6, 10000, 256) == pytest.approx(controller.value, rel=1e-12)


def test_importance_weights(verl_correction: ModuleType, openrlhf_loss: ModuleType, episodes: SimpleNamespace) -> None:
    mask, cap = episodes.mask, 1.2
    correct = partial(
        verl_correction.compute_rollout_correction_weights,
        episodes.old - episodes.reference,
        mask.float(),
        rollout_is_threshold=cap,
    )
    token, _ = correct(rollout_is="token")
    ours = importance_weights(episodes.old, episodes.reference, cap)
    assert 0 < (ours[mask] == ours.max()).sum() < mask.sum()
    same(token[mask], ours[mask])
    sequence, _ = correct(rollout_is="sequence")
    same(sequence[:, 0], sequence_importance_weights(episodes.old, episodes.reference, mask, cap))

    clipping = openrlhf_loss.PolicyLoss(
        CLIP, CLIP, is_correction_level="token", is_correction_mode="clip", is_correction_threshold=(0.0, cap)
    )
    theirs, *_ = clipping(
        episodes.log_probs, episodes.old, episodes.advantages, mask, rollout_log_probs=episodes.reference
    )
    terms = policy_loss(episodes.log_probs[mask], episodes.old[mask], episodes.advantages[mask], CLIP)
    same(theirs, (ours[mask] * terms.losses).mean())


def test_entropy() -> None:
    logits = 4 * torch.randn(12, 50)
    same(entropy_from_logits(logits), entropy(logits))
