"""Rewards of episodes, and the losses of actor and critic (proximal policy optimisation).

A mask, bool [R, T], marks the actions (sampled tokens) of each episode, contiguous from column 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


def missing_end_scores(scores: torch.Tensor, ended: torch.Tensor, missing_end_reward: float | None) -> torch.Tensor:
    """Scores [R]; an episode that was cut before its end token gets a fixed one (Huang et al. 2024).

    Args:
        scores: the reward model's, fp32 [R].
        ended: bool [R]; the last action is the end token.
        missing_end_reward: None keeps all scores.
    """
    return scores if missing_end_reward is None else torch.where(ended, scores, missing_end_reward)


def token_rewards(
    scores: torch.Tensor,
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    mask: torch.Tensor,
    coefficient: float,
) -> torch.Tensor:
    """Reward of each action: -beta (log pi - log pi_ref), plus the episode's score on its last action.

    The objective of Ziegler et al. 2019, equation 2, and Ouyang et al. 2022, equation 2, taken apart by tokens.

    Args:
        scores: fp32 [R].
        log_probs: of the actions, by the policy that sampled them, fp32 [R, T], in nats.
        reference_log_probs: by the reference, at the same temperature, fp32 [R, T].
        mask: bool [R, T]; each row has at least one action.
        coefficient: beta.

    Returns:
        fp32 [R, T], without a gradient; 0 outside the mask, whatever lies there.
    """
    continues = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    penalty = -coefficient * (log_probs - reference_log_probs)
    rewards = torch.where(mask & ~continues, penalty + scores[:, None], penalty)
    return torch.where(mask, rewards, 0).detach()


class PolicyTerms(NamedTuple):
    """One entry an action; divide a sum by the actions of the whole minibatch, over all ranks and micro-batches."""

    losses: torch.Tensor
    """fp32 [N]."""
    clipped: torch.Tensor
    """bool [N]; the clip binds, so the action has no gradient."""
    ratio: torch.Tensor
    """pi / pi_old, fp32 [N], without a gradient; 1 before the first update."""


def policy_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> PolicyTerms:
    """max(-A r, -A clip(r, 1 - eps, 1 + eps)) of each action, r = pi / pi_old (Schulman et al. 2017, equation 7).

    Args:
        log_probs: of the actions, by the policy being trained, fp32 [N].
        old_log_probs: by the policy that sampled them, as the trainer computes it, fp32 [N].
        advantages: A, fp32 [N].
        clip_range: eps.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyTerms(torch.maximum(plain, clipped), clipped > plain, ratio.detach())


class ValueTerms(NamedTuple):
    """One entry an action, as in `PolicyTerms`."""

    losses: torch.Tensor
    """fp32 [N]."""
    clipped: torch.Tensor
    """bool [N]; the clip binds, so the action has no gradient."""


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float) -> ValueTerms:
    """max((V - R)², (V_clip - R)²) / 2 of each action, V_clip within eps of V_old (PPO's published code; not in 2017).

    Args:
        values: V by the critic being trained, fp32 [N].
        old_values: by the critic before the step, fp32 [N].
        returns: R, fp32 [N].
        clip_range: eps, in units of reward.
    """
    plain = (values - returns).square()
    clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
    return ValueTerms(torch.maximum(plain, clipped) / 2, clipped > plain)
