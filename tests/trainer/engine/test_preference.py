"""Preference losses: published vectors, closed forms, and packed pairs against each answer alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.trainer.engine.stages import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab_trainer.algorithms.causal_lm import segment_sums
from trimtab_trainer.algorithms.preference import preference_losses
from trimtab_trainer.data.store import Row
from trimtab_trainer.engine.batches import MicroBatch, collate
from trimtab_trainer.engine.model import disable_dropout
from trimtab_trainer.engine.networks import LanguageModel
from trimtab_trainer.engine.objectives import Pairwise
from trimtab_trainer.settings import Preference, PreferenceLoss

MARGIN = torch.tensor([(-10 + 11) - (-12 + 11.5)])
"""Of log-probabilities -10 and -12 where the reference has -11 and -11.5."""
PROMPT, CHOSEN, REJECTED = [5, 9, 13], [7, 21, 2], [30, 31, 32, 33, 2]


def loss_of(margin: torch.Tensor, **settings: object) -> float:
    (loss,) = preference_losses(margin, Preference(**settings)).tolist()
    return float(loss)


def test_d1_dpo_and_conservative_dpo() -> None:
    assert loss_of(MARGIN, beta=0.1) == pytest.approx(0.6209570450, abs=1e-7)
    assert loss_of(MARGIN, beta=0.1, label_smoothing=0.1) == pytest.approx(0.6359570456, abs=1e-7)
    assert loss_of(torch.tensor([-1000.0]), beta=0.1) == pytest.approx(100.0)


def test_d4_ipo_takes_sums() -> None:
    assert loss_of(MARGIN, beta=0.1, loss=PreferenceLoss.IPO) == pytest.approx((1.5 - 5) ** 2)
    by_length = torch.tensor([(-10 + 11) / 3 - (-12 + 11.5) / 5])
    assert loss_of(by_length, beta=0.1, loss=PreferenceLoss.IPO) != pytest.approx((1.5 - 5) ** 2, rel=0.1)


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    """Of one architecture, with different weights."""
    made = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**TINY_LLAMA, initializer_range=0.3)
        made.append(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())
    return made


def forward(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    outputs: torch.Tensor = LanguageModel(model)(batch)
    return outputs


def pairs(*answers: list[int]) -> Row:
    """A row of the prompt with each answer."""
    texts = [PROMPT + answer for answer in answers]
    mask = np.concatenate([np.arange(len(text)) >= len(PROMPT) for text in texts])
    return Row(
        np.concatenate(texts).astype(np.int32),
        mask,
        [len(text) for text in texts],
        list(range(len(texts))),
    )


def log_prob(model: PreTrainedModel, answer: list[int]) -> torch.Tensor:
    """Of the answer after the prompt, token by token, in fp64."""
    ids = torch.tensor([PROMPT + answer])
    log_probs = model(ids).logits[0].double().log_softmax(-1)
    return sum((log_probs[len(PROMPT) - 1 + i, token] for i, token in enumerate(answer)), torch.zeros(()).double())


def test_d6_packed_and_padded_pairs_have_the_log_probs_and_gradients_of_each_answer_alone(
    models: list[PreTrainedModel],
) -> None:
    policy, reference = models
    answers = [CHOSEN, REJECTED, [*REJECTED, 40], CHOSEN[:2], [8, 2], [9, 9, 2]]
    batch = collate([pairs(*answers[:4]), pairs(*answers[4:])], padding_id=1)
    with torch.no_grad():
        found = segment_sums(forward(policy, batch)[0], batch.loss_tokens)
        alone = torch.stack([log_prob(policy, answer) for answer in answers])
    torch.testing.assert_close(found.double(), alone, atol=1e-5, rtol=1e-6)

    objective = Pairwise(lambda each: forward(reference, each), Preference(beta=0.3))
    policy.zero_grad()
    sums = objective.sums(forward(policy, batch), batch)
    sums.loss.backward()
    packed = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    total = torch.zeros(()).double()
    margins = []
    for chosen, rejected in zip(answers[::2], answers[1::2], strict=True):
        with torch.no_grad():
            held = log_prob(reference, chosen) - log_prob(reference, rejected)
        margins.append(log_prob(policy, chosen) - log_prob(policy, rejected) - held)
        total = total + torch.log1p(torch.exp(-0.3 * margins[-1]))
    total.backward()
    assert float(sums.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert float(sums.metrics["rewards_margin"]) == pytest.approx(0.3 * sum(map(float, margins)), abs=1e-4)
    assert float(sums.metrics["accuracy"]) == sum(float(margin) > 0 for margin in margins)
    lengths = [len(answer) for answer in answers]
    assert [float(sums.metrics[name]) for name in ("length_chosen", "length_rejected")] == [
        sum(lengths[::2]),
        sum(lengths[1::2]),
    ]
    with torch.no_grad():
        moved = [float(log_prob(policy, each) - log_prob(reference, each)) / len(each) for each in answers]
    right = [chosen > rejected for chosen, rejected in zip(moved[::2], moved[1::2], strict=True)]
    assert float(sums.metrics["accuracy_per_token"]) == sum(right)
    for one, other in zip(packed, (p.grad for p in policy.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_d2_a_model_that_is_its_reference(models: list[PreTrainedModel]) -> None:
    batch = collate([pairs(CHOSEN, REJECTED, [8, 2], CHOSEN)], padding_id=1)
    sums = Pairwise(lambda each: forward(models[0], each), Preference()).sums(forward(models[0], batch), batch)
    assert float(sums.loss) == pytest.approx(2 * math.log(2), abs=1e-7)
    assert float(sums.metrics["rewards_margin"]) == 0
    assert float(sums.metrics["accuracy"]) == 1.0, "half of each pair: a tie"


def test_d3_dropout_would_move_the_first_loss_and_is_off(models: list[PreTrainedModel]) -> None:
    config = AutoConfig.for_model(**TINY_LLAMA, initializer_range=0.3, attention_dropout=0.3)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    policy.load_state_dict(models[0].state_dict())
    batch = collate([pairs(CHOSEN, REJECTED, [8, 2], CHOSEN)], padding_id=1)
    objective = Pairwise(lambda each: forward(models[0], each), Preference())
    assert float(objective.sums(forward(policy, batch), batch).loss) != pytest.approx(2 * math.log(2), abs=1e-4)
    disable_dropout(policy)
    assert float(objective.sums(forward(policy, batch), batch).loss) == pytest.approx(2 * math.log(2), abs=1e-7)
    assert policy.config.attention_dropout == 0.3


def test_a_micro_batch_without_pairs_has_sums_of_zero_and_gradients_of_zero(models: list[PreTrainedModel]) -> None:
    policy, reference = models
    policy.zero_grad()
    batch = collate([], padding_id=1)
    sums = Pairwise(lambda each: forward(reference, each), Preference()).sums(forward(policy, batch), batch)
    sums.loss.backward()
    assert float(sums.loss) == 0
    assert set(map(float, sums.metrics.values())) == {0.0}
    gradients = [p.grad for p in policy.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
