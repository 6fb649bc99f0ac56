"""Reward-model losses: vectors, ties, prompts of different size, and where a score is read."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.engine.stages import TINY_LLAMA
from transformers import LlamaConfig, LlamaForSequenceClassification

from trimtab_trainer.algorithms.reward import comparison_losses, pool_last, ranking_losses
from trimtab_trainer.data.store import Row
from trimtab_trainer.engine.batches import collate

SCORES = torch.tensor([1.2, 0.7, 0.1, -0.4])
END = 2


def comparison(difference: float, margin: float = 0.0, probability: float = 1.0) -> float:
    return float(comparison_losses(*(torch.tensor([each]) for each in (difference, margin, probability))))


def test_r1_a_hopeless_comparison_has_a_finite_loss() -> None:
    assert comparison(-100.0) == pytest.approx(100.0)
    assert comparison(0.0) == pytest.approx(math.log(2))
    assert comparison(1e4) == 0.0
    differences = torch.tensor([-1e4], requires_grad=True)
    comparison_losses(differences, torch.zeros(1), torch.ones(1)).sum().backward()
    assert differences.grad is not None
    assert differences.grad.tolist() == [-1.0]


def test_r1_a_margin_is_taken_from_the_difference() -> None:
    assert comparison(1.5, margin=1.0) == pytest.approx(comparison(0.5))


def test_r8_a_soft_label_weighs_both_verdicts() -> None:
    assert comparison(0.5, probability=0.7) == pytest.approx(0.6240769842, abs=1e-7)
    assert comparison(-0.5, probability=0.3) == pytest.approx(0.6240769842, abs=1e-7)


def test_r8_the_loss_is_least_where_the_model_says_the_label() -> None:
    difference = torch.tensor([math.log(0.7 / 0.3)], requires_grad=True)
    comparison_losses(difference, torch.zeros(1), torch.tensor([0.7])).sum().backward()
    assert difference.grad is not None
    assert float(difference.grad) == pytest.approx(0, abs=1e-7)


def test_r2_a_ranking_of_four_scored_once() -> None:
    scores = SCORES.clone().requires_grad_()
    terms = ranking_losses(scores, torch.tensor([1, 2, 3, 4]), [4])
    assert float(terms.losses) == pytest.approx(0.3573688784, abs=1e-7)
    terms.losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-0.132544, -0.037757, 0.037757, 0.132544], abs=1e-6)
    assert float(terms.accuracies) == 1.0


def test_r2_a_group_of_two_is_a_pair() -> None:
    terms = ranking_losses(torch.tensor([0.2, 0.9]), torch.tensor([2, 1]), [2])
    assert float(terms.losses) == pytest.approx(comparison(0.7))


RANKINGS = st.lists(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 3.0]), st.integers(1, 4)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@given(RANKINGS)
def test_r2_prompts_of_different_size_equal_their_pairs_expanded(prompts: list[list[tuple[float, int]]]) -> None:
    flat = [answer for prompt in prompts for answer in prompt]
    scores = torch.tensor([score for score, _ in flat], requires_grad=True)
    terms = ranking_losses(scores, torch.tensor([rank for _, rank in flat]), [len(prompt) for prompt in prompts])
    (gradient,) = torch.autograd.grad(terms.losses.sum(), scores)
    expanded = torch.zeros(())
    for at, prompt in enumerate(prompts):
        start = sum(len(before) for before in prompts[:at])
        pairs = [(i, j) if prompt[i][1] < prompt[j][1] else (j, i) for i, j in combinations(range(len(prompt)), 2)]
        pairs = [(i, j) for i, j in pairs if prompt[i][1] != prompt[j][1]]
        differences = [prompt[i][0] - prompt[j][0] for i, j in pairs]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values) if values else 0.0

        assert float(terms.losses[at]) == pytest.approx(mean([math.log1p(math.exp(-d)) for d in differences]), abs=1e-6)
        assert float(terms.accuracies[at]) == pytest.approx(mean([(d > 0) + 0.5 * (d == 0) for d in differences]))
        assert float(terms.margins[at]) == pytest.approx(mean(differences), abs=1e-6)
        assert float(terms.confidences[at]) == pytest.approx(mean([1 / (1 + math.exp(-abs(d))) for d in differences]))
        for i, j in pairs:
            one = comparison_losses(scores[start + i] - scores[start + j], torch.zeros(()), torch.ones(()))
            expanded = expanded + one / len(pairs)
    if expanded.requires_grad:
        torch.testing.assert_close(gradient, torch.autograd.grad(expanded, scores)[0])
    else:
        assert not gradient.any()


def test_r2_answers_of_equal_rank_are_not_compared() -> None:
    tied = ranking_losses(torch.tensor([5.0, -5.0, 0.0]), torch.tensor([1, 1, 2]), [3])
    expected = (comparison(5.0) + comparison(-5.0)) / 2
    assert float(tied.losses) == pytest.approx(expected)
    assert float(tied.accuracies) == 0.5


def test_r2_no_prompt_still_has_a_gradient() -> None:
    scores = torch.zeros(0, requires_grad=True)
    losses = ranking_losses(scores, torch.zeros(0, dtype=torch.long), []).losses
    assert losses.shape == (0,)
    losses.sum().backward()
    assert scores.grad is not None


def test_r7_equal_scores_are_half_right_and_uneven_shards_add_up() -> None:
    scores, ranks = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0, 1.0]), torch.tensor([1, 2] * 3)
    assert ranking_losses(scores, ranks, [2, 2, 2]).accuracies.tolist() == [0.5, 1.0, 0.0]
    shards = [ranking_losses(scores[:4], ranks[:4], [2, 2]), ranking_losses(scores[4:], ranks[4:], [2])]
    assert sum(float(shard.accuracies.sum()) for shard in shards) / 3 == 0.5


@pytest.fixture(scope="module")
def model() -> LlamaForSequenceClassification:
    torch.manual_seed(5)
    keys = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    config = LlamaConfig(**keys, num_labels=1, initializer_range=0.3, pad_token_id=None)
    return LlamaForSequenceClassification(config).eval()


TEXTS = [[5, 9, END, 13, 7, END], [8, 4, 11, END], [6, END, END]]
"""The end token stands inside them too, and twice at the end."""


def scores_of(model: LlamaForSequenceClassification, rows: list[list[list[int]]], padding_id: int) -> torch.Tensor:
    batch = collate(
        [
            Row(
                np.concatenate(texts).astype(np.int32),
                np.ones(sum(map(len, texts)), dtype=bool),
                [len(text) for text in texts],
                list(range(len(texts))),
            )
            for texts in rows
        ],
        padding_id=padding_id,
    )
    hidden = model.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    return model.score(pool_last(hidden, [[len(text) for text in texts] for texts in rows])).squeeze(-1)


@pytest.mark.parametrize("padding_id", [END, 0, 17])
def test_r3_the_last_token_of_each_segment_is_scored_whatever_pads_the_row(
    model: LlamaForSequenceClassification, padding_id: int
) -> None:
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([text])).logits[:, 0] for text in TEXTS])
        for rows in ([[text] for text in TEXTS], [TEXTS[:2], TEXTS[2:]], [TEXTS]):
            torch.testing.assert_close(scores_of(model, rows, padding_id), alone, atol=1e-5, rtol=1e-5)


def test_r3_scores_may_be_pooled_as_well_as_hidden_states() -> None:
    scores = torch.arange(12.0).view(2, 6).requires_grad_()
    pooled = pool_last(scores, [[2, 3], [4]])
    assert pooled.tolist() == [1.0, 4.0, 9.0]
    pooled.sum().backward()
    assert scores.grad is not None
    assert scores.grad.flatten().nonzero().flatten().tolist() == [1, 4, 9]
    assert pool_last(scores[:0], []).shape == (0,)


def test_r5_padding_has_no_part_in_the_loss(model: LlamaForSequenceClassification) -> None:
    gradients = []
    for padding_id in (END, 17):
        model.zero_grad()
        scores = scores_of(model, [TEXTS[:2], TEXTS[2:]], padding_id)
        ranking_losses(scores, torch.tensor([2, 1, 3]), [3]).losses.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
