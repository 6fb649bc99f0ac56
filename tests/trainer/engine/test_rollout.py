"""Sampling: the full distribution, at the temperature, whoever else is in the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.engine.stages import END_OF_TURN, PADDING, TINY_LLAMA, VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab_trainer.data.store import Row
from trimtab_trainer.engine.rollout import Episode
from trimtab_trainer.engine.rollout_transformers import TransformersSampler, _Draw
from trimtab_trainer.ppo_settings import Rollout

DRAWS = 2000


@pytest.fixture(scope="module")
def engine() -> Any:
    torch.manual_seed(5)
    config = AutoConfig.for_model(**TINY_LLAMA, initializer_range=0.5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return SimpleNamespace(
        module=model, device=torch.device("cpu"), deepspeed=SimpleNamespace(zero_optimization_stage=lambda: 0)
    )


def sample(engine: Any, prompts: list[Row], stream: int, seed: int = 3, **settings: Any) -> list[Episode]:
    sampler = TransformersSampler(engine, Rollout(**settings), seed, END_OF_TURN, PADDING, DRAWS, world_size=1)
    return sampler.sample(prompts, max(1, len(prompts)), stream, lambda: None)


def prompt(record: int, *ids: int) -> Row:
    return Row(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.bool_), [len(ids)], [record])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_p1_p2_tokens_come_from_the_softmax_at_the_temperature(engine: Any, temperature: float) -> None:
    prompts = [prompt(record, 5, 9, 13) for record in range(DRAWS)]
    episodes = sample(engine, prompts, 0, max_new_tokens=1, temperature=temperature)
    counts = np.bincount([episode.row.input_ids[-1] for episode in episodes], minlength=VOCABULARY)
    with torch.no_grad():
        logits = engine.module(torch.tensor([[5, 9, 13]])).logits[0, -1].double()
    expected = DRAWS * (logits / temperature).softmax(dim=0).numpy()
    often = expected >= 5
    squares = ((counts - expected)[often] ** 2 / expected[often]).sum()
    # chi-square of k values has mean k - 1 and variance 2 (k - 1); five deviations
    degrees = int(often.sum())
    assert degrees > 10
    assert squares < degrees + 5 * (2 * degrees) ** 0.5


def test_s11_prompts_padded_on_the_left_get_the_logits_that_they_have_alone(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first new token and of one that follows it, where positions go on from the prompt's own length."""
    prompts = [prompt(0, 5, 9), prompt(1, 7, 30, 31, 8, 40, 41), prompt(2, 11)]
    seen: list[torch.Tensor] = []
    draw = _Draw.__call__

    def note(self: _Draw, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return draw(self, input_ids, scores)

    monkeypatch.setattr(_Draw, "__call__", note)
    episodes = sample(engine, prompts, 0, max_new_tokens=2)
    for i, (given, episode) in enumerate(zip(prompts, episodes, strict=True)):
        with torch.no_grad():
            alone = engine.module(torch.from_numpy(episode.row.input_ids).long()[None]).logits[0]
        for step in range(episode.actions):
            expected = alone[len(given.input_ids) - 1 + step]
            torch.testing.assert_close(seen[step][i], expected, atol=1e-5, rtol=1e-5)


def test_p15_each_prompt_has_its_own_answer_whoever_stands_beside_it(engine: Any) -> None:
    prompts = [prompt(record, *range(5, 7 + record)) for record in range(6)]
    together = sample(engine, prompts, 4, max_new_tokens=12)
    apart = [sample(engine, [each], 4, max_new_tokens=12)[0] for each in reversed(prompts)][::-1]
    assert len(together) == len(prompts)
    assert [e.row.input_ids.tolist() for e in together] == [e.row.input_ids.tolist() for e in apart]
    for each, given in zip(together, prompts, strict=True):
        size = len(given.input_ids)
        answer = each.row.input_ids[size:].tolist()
        assert each.row.input_ids[:size].tolist() == given.input_ids.tolist()
        assert each.row.loss_mask.tolist() == [False] * size + [True] * len(answer)
        assert each.ended == (END_OF_TURN in answer)
        assert END_OF_TURN not in answer[:-1]
        assert each.ended or len(answer) == 12


def test_p1_seed_and_step_change_the_answers(engine: Any) -> None:
    prompts = [prompt(record, 5, 9, 13) for record in range(8)]
    answers = [
        [episode.row.input_ids.tolist() for episode in sample(engine, prompts, step, seed, max_new_tokens=8)]
        for seed, step in ((3, 0), (4, 0), (3, 1))
    ]
    assert answers[0] != answers[1]
    assert answers[0] != answers[2]
    assert len({tuple(ids) for ids in answers[0]}) > 1
    assert sample(engine, [], 0, max_new_tokens=8) == []
