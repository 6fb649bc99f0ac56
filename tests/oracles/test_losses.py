"""Losses on tokens, pairs and comparisons against TRL 1.16, OpenRLHF, Liger and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from trimtab_trainer.algorithms.causal_lm import logit_log_probs, segment_sums
from trimtab_trainer.algorithms.preference import preference_losses
from trimtab_trainer.algorithms.reward import comparison_losses, pool_last, ranking_losses
from trimtab_trainer.settings import Preference, PreferenceLoss

same = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
VOCABULARY = 64
PADDING = 1
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=PADDING,
    num_labels=1,
)
PAIRS = [
    {"prompt_ids": [5, 9, 13], "chosen_ids": [7, 21, 2], "rejected_ids": [30, 31, 32, 33, 2]},
    {"prompt_ids": [8], "chosen_ids": [40, 2], "rejected_ids": [41, 42, 2]},
    {"prompt_ids": [8, 4, 4, 6], "chosen_ids": [11, 12, 13, 14, 15, 16, 2], "rejected_ids": [2]},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token=f"w{PADDING}", unk_token="w3")


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, object]:
    """What every trainer here is told."""
    return {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}


def token_log_probs(logits: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the tokens that bear loss, [N]; logits [R, T, V] of the tokens after each."""
    bears_loss = mask[:, 1:]
    return logit_log_probs(logits[:, :-1][bears_loss], input_ids[:, 1:][bears_loss])[0]


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_trl_sft(tokenizer: PreTrainedTokenizerFast, quiet: dict[str, object]) -> None:
    rows = [
        {"input_ids": [5, 9, 13, 7, 21, 2], "completion_mask": [0, 0, 0, 1, 1, 1]},
        {"input_ids": [8, 40, 2], "completion_mask": [0, 1, 1]},
    ]
    model = LlamaForCausalLM(LLAMA)
    ours = deepcopy(model)
    trainer = SFTTrainer(
        model, SFTConfig(**quiet, completion_only_loss=True), None, Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch["labels"].clone()
    logits = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = gradients(trainer.compute_loss(trainer.model, dict(batch)), trainer.model)
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, dict(batch))
    loss = -token_log_probs(logits, batch["input_ids"], labels != -100).sum() / 5
    same(loss.detach(), theirs)
    torch.testing.assert_close(gradients(loss, ours), expected, atol=1e-5, rtol=1e-5)


def test_trl_reward(tokenizer: PreTrainedTokenizerFast, quiet: dict[str, object]) -> None:
    model = LlamaForSequenceClassification(LLAMA)
    texts = Dataset.from_list([{"chosen": "w5 w6", "rejected": "w7 w8"}])
    trainer = RewardTrainer(model, RewardConfig(**quiet), train_dataset=texts, processing_class=tokenizer)
    answers = [
        {name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")} | {"margin": 0.3 * i}
        for i, pair in enumerate(PAIRS)
    ]
    batch = trainer.data_collator(answers)
    lengths = [[len(each[name])] for name in ("chosen_ids", "rejected_ids") for each in answers]
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    chosen, rejected = model.score(pool_last(hidden, lengths)).squeeze(-1).chunk(2)
    margins = batch["margin"].clone()
    loss = comparison_losses(chosen - rejected, margins, torch.ones(3)).mean()
    same(loss, trainer.compute_loss(model, {k: v for k, v in batch.items() if k != "return_loss"}))

    scores = torch.stack([chosen, rejected], dim=1).flatten()
    plain = ranking_losses(scores, torch.tensor([1, 2] * 3), [2] * 3)
    without = {k: v for k, v in batch.items() if k not in ("return_loss", "margin")}
    same(plain.losses.mean(), trainer.compute_loss(model, without))
    assert float(plain.accuracies.mean()) == pytest.approx(trainer._metrics["train"]["accuracy"][-1])


@pytest.fixture
def dpo(tokenizer: PreTrainedTokenizerFast, quiet: dict[str, object]) -> Callable[[str], tuple[torch.Tensor, ...]]:
    """TRL's loss of the pairs; log-ratio and length of each answer, the chosen ones first."""

    def run(loss_type: str) -> tuple[torch.Tensor, ...]:
        policy, reference = LlamaForCausalLM(LLAMA), LlamaForCausalLM(LLAMA)
        untouched = deepcopy((policy, reference))
        texts = Dataset.from_list([{"prompt": "w4", "chosen": "w5 w6", "rejected": "w7 w8"}])
        arguments = DPOConfig(**quiet, beta=0.3, loss_type=loss_type, disable_dropout=True)
        trainer = DPOTrainer(policy, reference, arguments, train_dataset=texts, processing_class=tokenizer)
        batch = trainer.data_collator(PAIRS)
        mask = batch["completion_mask"].bool()
        lengths = mask.sum(dim=1).tolist()

        def log_probs(model: LlamaForCausalLM) -> torch.Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return segment_sums(token_log_probs(logits, batch["input_ids"], mask), lengths)

        with torch.no_grad():
            policy_sums, reference_sums = (log_probs(model) for model in untouched)
            theirs = trainer.compute_loss(trainer.model, dict(batch))
        return theirs, policy_sums - reference_sums, torch.tensor(lengths)

    return run


def margins_of(answers: torch.Tensor) -> torch.Tensor:
    chosen, rejected = answers.chunk(2)
    return chosen - rejected


def test_trl_dpo(dpo: Callable[[str], tuple[torch.Tensor, ...]]) -> None:
    theirs, ratios, _ = dpo("sigmoid")
    same(preference_losses(margins_of(ratios), Preference(beta=0.3)).mean(), theirs)


def test_trl_ipo_averages_over_tokens_where_we_add_up(dpo: Callable[[str], tuple[torch.Tensor, ...]]) -> None:
    theirs, ratios, lengths = dpo("ipo")
    ipo = Preference(beta=0.3, loss=PreferenceLoss.IPO)
    same(preference_losses(margins_of(ratios / lengths), ipo).mean(), theirs)
    assert abs(float(preference_losses(margins_of(ratios), ipo).mean() - theirs)) > 0.1


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        (Preference(beta=0.3), {"beta": 0.3}),
        (Preference(beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
        (Preference(beta=0.3, loss=PreferenceLoss.IPO), {"beta": 0.3, "ipo": True}),
    ],
    ids=["dpo", "conservative", "ipo"],
)
def test_openrlhf_dpo(openrlhf_loss: ModuleType, settings: Preference, theirs: dict[str, float]) -> None:
    chosen, rejected, chosen_reference, rejected_reference = (-10 * torch.rand(4, 20)).unbind()
    ours = preference_losses((chosen - chosen_reference) - (rejected - rejected_reference), settings).mean()
    loss, *_ = openrlhf_loss.DPOLoss(**theirs)(chosen, rejected, chosen_reference, rejected_reference)
    same(ours, loss)


def test_openrlhf_pairs(openrlhf_loss: ModuleType) -> None:
    chosen, rejected, margins = (3 * torch.randn(3, 20)).unbind()
    ours = comparison_losses(chosen - rejected, margins, torch.ones(20)).mean()
    same(ours, openrlhf_loss.PairWiseLoss()(chosen, rejected, margins))
    hopeless = torch.tensor([-100.0])
    assert float(openrlhf_loss.LogExpLoss()(hopeless, torch.zeros(1))) == torch.inf
    assert float(comparison_losses(hopeless, torch.zeros(1), torch.ones(1))) == pytest.approx(100.0)


def test_openrlhf_sft(openrlhf_loss: ModuleType) -> None:
    logits, ids = torch.randn(3, 8, VOCABULARY), torch.randint(0, VOCABULARY, (3, 8))
    mask = torch.rand(3, 8) < 0.6
    mask[:, 0] = False
    count = int(mask.sum())
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    theirs = openrlhf_loss.SFTLoss()(log_probs, mask[:, 1:], batch_num_tokens=count)
    same(-token_log_probs(logits, ids, mask).sum() / count, theirs)


def test_liger_dpo() -> None:
    head, reference_head = torch.randn(2, VOCABULARY, 16)
    hidden, reference = torch.randn(2, 4, 7, 16)
    ids = torch.randint(0, VOCABULARY, (4, 8))
    mask = torch.arange(8) >= torch.tensor([[3], [5], [2], [7]])
    target = torch.where(mask, ids, -100)[:, 1:]
    fused = LigerFusedLinearDPOLoss(beta=0.3, compiled=False)
    theirs = fused(head, hidden, target, ref_input=reference, ref_weight=reference_head)[0]

    def log_probs(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.pad(states @ weight.T, (0, 0, 0, 1))
        return segment_sums(token_log_probs(logits, ids, mask), mask.sum(dim=1).tolist())

    ratios = log_probs(hidden, head) - log_probs(reference, reference_head)
    same(preference_losses(margins_of(ratios), Preference(beta=0.3)).mean(), theirs)


def test_deepspeed_chunked_cross_entropy() -> None:
    logits = (4 * torch.randn(3, 8, VOCABULARY)).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (3, 8))
    mask = torch.rand(3, 8) < 0.6
    mask[:, 0] = False
    targets = torch.where(mask, ids, -100)[:, 1:].reshape(-1)
    predictions = logits[:, :-1].reshape(-1, VOCABULARY)
    theirs = chunked_cross_entropy(predictions, targets, reduction="mean", block_rows=5, backend="torch")
    ours = -token_log_probs(logits, ids, mask).sum() / mask.sum()
    same(ours, theirs)
    same(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0])
