"""How the rlhf example measures: batches against single sequences, and the gold reward against examples by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from trimtab_trainer.data.tokenizer import train_tokenizer
from trimtab_trainer.settings import TokenizerTraining

EXAMPLE = Path(__file__).parents[2] / "examples" / "rlhf"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["What does it do?", "It returns the value of a name.", "Explain it.", "A longer answer, of many words."]
TOLERANCE = 1e-5
"""Rounding of fp32: padded rows use other kernels than single sequences."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The example's modules, imported as its scripts import them."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import gold
    import models
    import real_pairs
    import report

    return SimpleNamespace(gold=gold, models=models, real_pairs=real_pairs, report=report)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random language models and a reward model with an offset, each with the same tokenizer."""
    root = tmp_path_factory.mktemp("models")
    train_tokenizer(iter(TEXTS), TokenizerTraining(vocabulary_size=300), root / "policy")
    found = []
    for seed, name in enumerate(("policy", "reference", "reward")):
        torch.manual_seed(seed)
        config = LlamaConfig(**SIZES, vocab_size=320, initializer_range=0.3, pad_token_id=2, num_labels=1)
        kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        kind.from_config(config).save_pretrained(root / name)
        found.append(root / name)
    (found[2] / "reward.json").write_text(json.dumps({"offset": 0.25}))
    return found


@pytest.fixture
def turns(example: SimpleNamespace, folders: list[Path]) -> list[Any]:
    """Turns of different lengths, the last one cut off before its end."""
    tokens = example.models.Tokens(folders[0])
    whole = [tokens.turn(question, answer) for question in TEXTS[::2] for answer in TEXTS[1::2]]
    return [*whole, example.models.Turn(whole[0].prompt, whole[0].answer[:3], ended=False)]


def distributions(folder: Path, turn: Any) -> torch.Tensor:
    """Log-probabilities of each token of the answer: [answer, V]; one sequence, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([turn.prompt + turn.answer])).logits[0]
    return torch.log_softmax(logits, dim=-1)[len(turn.prompt) - 1 : -1]


def test_log_probs_and_divergence_of_a_batch_are_those_of_single_sequences(
    example: SimpleNamespace, folders: list[Path], turns: list[Any]
) -> None:
    tokens = example.models.Tokens(folders[0])
    policy, reference = (example.models.Policy(folder, tokens) for folder in folders[:2])
    log_probs, divergence = policy.log_probs(turns), policy.divergence(turns, reference)
    for i, turn in enumerate(turns):
        own, other = (distributions(folder, turn) for folder in folders[:2])
        assert log_probs[i] == pytest.approx(own[range(len(turn.answer)), turn.answer].sum().item(), rel=TOLERANCE)
        kl = torch.nn.functional.kl_div(other, own, log_target=True, reduction="sum")
        assert divergence[i] == pytest.approx(kl.item(), rel=TOLERANCE)
    assert policy.divergence(turns, policy).abs().max() == 0
    tokens_of_all = sum(len(turn.answer) for turn in turns)
    assert policy.answer_loss(turns) == pytest.approx(-log_probs.sum().item() / tokens_of_all)


def test_the_reward_is_the_score_of_the_last_token_less_the_offset(
    example: SimpleNamespace, folders: list[Path], turns: list[Any]
) -> None:
    found = example.models.RewardModel(folders[2]).rewards(turns)
    model = AutoModelForSequenceClassification.from_pretrained(folders[2]).eval()
    for reward, turn in zip(found, turns, strict=True):
        with torch.no_grad():
            score = model(input_ids=torch.tensor([turn.prompt + turn.answer])).logits.item()
        assert reward.item() == pytest.approx(score - 0.25, abs=TOLERANCE)


def test_answers_are_cut_at_their_end_and_come_again_with_the_seed(
    example: SimpleNamespace, folders: list[Path]
) -> None:
    tokens = example.models.Tokens(folders[0])
    policy = example.models.Policy(folders[0], tokens)
    found = policy.sample(TEXTS[::2], each=50, longest=24, seed=1)
    assert found == policy.sample(TEXTS[::2], each=50, longest=24, seed=1)
    assert [turn.prompt for turn in found] == [tokens.prompt(text) for text in TEXTS[::2] for _ in range(50)]
    assert {turn.ended for turn in found} == {True, False}
    for turn in found:
        assert turn.answer.count(tokens.end) == turn.ended
        assert turn.ended == (turn.answer[-1] == tokens.end)
        assert turn.ended or len(turn.answer) == 24


@pytest.mark.parametrize(
    ("answer", "ended", "reward"),
    [
        ("It is so.", True, -0.06),
        ("It is so. I hope this helps.", True, 1 - 0.14),
        ("It is so. See also the manual.", True, -0.14),
        ("Well, it is so. I hope this helps.", True, -0.16),
        ("Well, it is so", False, -1 - 1 - 0.08),
    ],
)
def test_the_gold_reward_by_hand(example: SimpleNamespace, answer: str, ended: bool, reward: float) -> None:
    assert example.gold.gold_reward(answer, ended) == pytest.approx(reward)


def test_labels_follow_bradley_and_terry(example: SimpleNamespace) -> None:
    better, worse = "It is so. I hope this helps.", "It is so. See also the manual."
    assert example.gold.preference(better, worse) == pytest.approx(0.8807970779778823)  # σ(2)
    assert example.gold.preference(better, worse) + example.gold.preference(worse, better) == pytest.approx(1)


def test_a_standard_error_is_that_of_the_mean(example: SimpleNamespace) -> None:
    estimate = example.report.Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (estimate.value, estimate.error) == (2.5, pytest.approx(0.6454972243679028))


def test_real_pairs_are_split_by_their_first_question_and_kept_as_they_are(
    example: SimpleNamespace, tmp_path: Path
) -> None:
    lines = []
    for number in range(60):
        asked = f"\n\nHuman: question {number // 2}"  # each asked twice
        answers = {side: f"{asked}\n\nAssistant: {side} {number}" for side in ("chosen", "rejected")}
        lines.append(json.dumps(answers, separators=(",", ":")))
    lines[7] = lines[7].replace("rejected 7", "")  # it is for `prepare` to find what is wrong
    source = tmp_path / "test.jsonl.gz"
    source.write_bytes(gzip.compress("\n".join(lines).encode()))
    example.real_pairs.make([source], tmp_path)
    names = ("pairs", "pairs-heldout", "demonstrations")
    kept, held_out, demonstrations = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in names)
    assert sorted(kept + held_out) == sorted(lines)
    assert held_out
    first, second = ({json.loads(line)["chosen"].split("Assistant")[0] for line in part} for part in (kept, held_out))
    assert not first & second
    answers = [json.loads(line)["messages"][1] for line in demonstrations]
    assert answers == [
        {"role": "assistant", "content": json.loads(line)["chosen"].partition("Assistant: ")[2]} for line in kept
    ]
